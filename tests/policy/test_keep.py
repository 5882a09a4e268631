"""How many adaptive instances keep to prefill."""

from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from tetri.policy.keep import CALM, GAIN, keep, pressure
from tetri.policy.views import ClusterLoad

# A decode step takes 50 ms, and 2 ms more for each request; prompts take 0.2 s. The limits: 2 s and 0.15 s.
CALM_LOAD = ClusterLoad(
    instances=4,
    prefill=0.4,
    requests=2.0,
    output=20.0,
    context=1000,
    kv_tokens=10**6,
    mean_s=0.2,
    long_s=0.4,
    base_s=0.05,
    request_s=0.002,
    beside=0.8,
    ttft_s=2.0,
    tpot_s=0.15,
)
BOTH = {"prefill": 1.5, "requests": 15.0, "tpot_s": 0.06}  # many prompts, and no time for them between two tokens


def load(**changes):
    return replace(CALM_LOAD, **changes)


def pressures(**changes):
    return [pressure(load(**changes), kept) for kept in range(4)]


def test_while_limits_are_kept_with_ease_all_instances_do_both():
    easy = load(tpot_s=0.5, ttft_s=20.0)
    assert pressure(easy, 0) < CALM and [keep(easy, now) for now in range(4)] == [0] * 4


def test_with_tight_limits_of_tpot_and_many_prompts_some_keep_to_prefill():
    wanted = keep(load(**BOTH), 0)
    assert 0 < wanted < 4 and pressures(**BOTH)[wanted] == min(pressures(**BOTH))
    assert keep(load(**BOTH), wanted) == wanted


def test_the_more_prompts_the_more_instances_keep_to_prefill():
    wanted = [keep(load(prefill=prefill, tpot_s=0.07), 0) for prefill in (0.1, 0.5, 1.5, 2.2)]
    assert wanted == sorted(wanted) and wanted[0] < wanted[-1]


@pytest.mark.parametrize("change", [{"prefill": 5.0}, {"requests": 200.0}, {"context": 4 * 10**6 + 1}])
def test_a_load_beyond_what_there_is_changes_nothing(change):
    assert pressures(**change) == [inf] * 4
    assert [keep(load(**change), now) for now in range(4)] == [0, 1, 2, 3]


def test_instances_that_decode_must_hold_all_contexts():
    assert [kept for kept, each in enumerate(pressures(context=2 * 10**6)) if each == inf] == [3]


def test_a_change_must_be_worth_it():
    """Just above the threshold all do both still, and just below it those that keep to prefill go on."""
    at = next(prefill / 100 for prefill in range(100, 400) if pressures(prefill=prefill / 100)[0] > CALM)
    assert keep(load(prefill=at), 0) == 0
    best = min(range(4), key=pressures(prefill=at).__getitem__)
    assert keep(load(prefill=at), best) == best > 0


AMOUNT = st.floats(0.01, 4.0)


@settings(deadline=None, derandomize=True)
@given(AMOUNT, st.floats(1.0, 2000.0), st.floats(0.03, 0.5), st.floats(0.3, 9.0), st.integers(2, 40), st.data())
def test_one_decodes_always_and_no_choice_is_much_better(prefill, tokens, tpot_s, ttft_s, instances, data):
    made = load(prefill=prefill, requests=tokens / 20, tpot_s=tpot_s, ttft_s=ttft_s, instances=instances)
    now = data.draw(st.integers(0, instances - 1))
    chosen = keep(made, now)
    assert 0 <= chosen < instances
    if chosen == now:  # few enough instances that all numbers are compared
        limit = (1 - GAIN) * pressure(made, now)
        assert instances > 8 or now == 0 or min(pressure(made, kept) for kept in range(instances)) >= limit
    assert keep(made, chosen) == chosen or pressure(made, 0) <= CALM + GAIN


@settings(deadline=None, derandomize=True)
@given(AMOUNT, st.floats(0.05, 100.0), st.integers(0, 3), st.sampled_from(["load", "prefill", "ttft_s", "tpot_s"]))
def test_more_load_or_a_tighter_limit_is_never_less_pressure(prefill, requests, kept, name):
    made = load(prefill=prefill, requests=requests)
    factors = {"load": {"prefill": 1.25, "requests": 1.25}, "prefill": {"prefill": 1.25}}.get(name, {name: 0.8})
    worse = replace(made, **{of: factor * getattr(made, of) for of, factor in factors.items()})
    assert pressure(worse, kept) >= pressure(made, kept) * 0.98  # as near as the pace is found


def test_time_between_tokens_is_judged_by_what_one_request_in_ten_meets():
    """The fewer prompts arrive while a request decodes, the more their work differs between requests."""
    few, many = (pressure(load(prefill=1.5, requests=requests, request_s=0.0), 0) for requests in (1.0, 20.0))
    assert few > many > 0


def test_leaving_the_split_for_all_doing_both_needs_less_than_going_there():
    pressures_now = {0: 1.0, 1: 0.93, 2: 2.0, 3: 2.0}
    assert [keep_at(pressures_now, now) for now in range(4)] == [0, 1, 1, 1]
    assert [keep_at({**pressures_now, 1: 0.96}, now) for now in range(4)] == [0, 0, 0, 0]
    assert keep_at({**pressures_now, 1: 0.89}, 0) == 1


def keep_at(pressures, now):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tetri.policy.keep.pressure", lambda load, kept, least=inf: min(pressures[kept], least))
        return keep(CALM_LOAD, now)
