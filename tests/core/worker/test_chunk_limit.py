"""How large the chunks of an adaptive worker are beside its decodes."""

from math import inf

import pytest

from tests.core.build import assign, capacity, flip, offer
from tests.core.driver import working
from tests.core.reading import only
from tetri.core.actions import Step
from tetri.core.worker.chunk_limit import AIMED, EXPECTED, GAINED
from tetri.cost import Cost
from tetri.request import Slo

# A chunk of n tokens takes half a second and n sixteenths, a decode step half a second, both together as the chunk.
COST = Cost(prefill=((0.0, 0.5), (64.0, 4.5)), decode=((1.0, 0.5),))
LARGE = capacity(blocks=200, context=400, chunk_tokens=64, max_batch=4)
USUAL = 20  # tokens of an output, where one has ended


def begin(role="auto", **changes):
    return working("m1", **{"role": role, "capacity": LARGE, "cost": COST, "slots": 60, **changes})


def beside(tpot_s=2.0, role="auto", usual=False, **changes):
    """`x` decodes, and has two tokens since its first one a moment ago."""
    told = begin(role, **changes)
    told.later(100.0)
    if usual:
        told.running("w", max_tokens=USUAL)
        for _ in range(USUAL - 2):
            told.step()
    return told.running("x", number=2, max_tokens=90, tpot_s=tpot_s)


def asked(told, prompt=100, ttft_s=None, waits=0.0):
    """The next step, when a prompt with this limit has come."""
    told.now += waits
    actions = told.tell(assign("a", prompt, max_tokens=4).changed(slo=Slo(ttft_s=ttft_s)))
    (step,) = only([*actions, *told.later()], Step)
    return step


@pytest.mark.parametrize("role", ["prefill", "mixed"])
def test_in_a_fixed_role_a_chunk_is_what_the_budget_leaves(role):
    told = beside(role=role)
    assert asked(told, ttft_s=1.0) == Step(1)
    assert told.chunk() == [("a", 0, 63)]


def test_without_decodes_a_chunk_has_the_best_rate():
    assert asked(begin()) == Step(1, 64)
    slow_beyond_32 = Cost(prefill=((0.0, 0.5), (32.0, 2.5), (64.0, 9.0)), decode=((1.0, 0.5),))
    told = begin(cost=slow_beyond_32)
    assert asked(told) == Step(1, 32) and told.chunk() == [("a", 0, 32)]


@pytest.mark.parametrize(
    "tpot_s, waits, tokens",
    [
        (None, 0.0, 63),
        (2.0, 0.0, 32),  # 3.8 s ahead: 2.5 s, and 63 tokens would take 4.4
        (2.0, 1.8, 16),  # 2.0 s
        (2.0, 3.0, 0),  # 0.8 s
        (2.0, 3.5, 63),  # its limit is lost
    ],
)
def test_a_chunk_takes_the_time_that_its_decodes_are_ahead(tpot_s, waits, tokens):
    told = beside(tpot_s)
    assert asked(told, waits=waits) == Step(1, tokens)
    assert told.chunk() == ([("a", 0, tokens)] if tokens else [])


def test_decodes_without_a_chunk_get_ahead_and_then_a_chunk_runs():
    told = beside()
    assert asked(told, waits=3.0) == Step(1, 0)
    told.step()
    assert only(told.later(), Step) == [Step(1, 32)] and told.chunk() == [("a", 0, 32)]


def test_decodes_pay_for_chunks_what_they_may_catch_up_with():
    """After an output of 20 tokens, 40 more count: 56 s more."""
    assert asked(beside(), waits=3.0) == Step(1, 0)
    assert asked(beside(usual=True), waits=3.0) == Step(1, 63)
    assert asked(beside(usual=True), waits=56.8) == Step(1, 32)


@pytest.mark.parametrize(
    "ttft_s, tokens",
    [
        (None, 16),
        (32.0, 16),  # less than half of its time is over
        (-9.0, 63),  # it is late: the one decode may be late too
    ],
)
def test_for_each_prompt_that_presses_a_decode_may_miss_its_limit(ttft_s, tokens):
    assert asked(beside(usual=True), ttft_s=ttft_s, waits=57.8) == Step(1, tokens)


@pytest.mark.parametrize("ttft_s, tokens", [(None, 32), (32.0, 32), (-9.0, 63)])
def test_beside_decodes_the_chunk_that_adds_least_a_token_unless_a_prompt_presses(ttft_s, tokens):
    dearer_beyond_32 = Cost(prefill=((0.0, 0.5), (32.0, 2.5), (64.0, 5.4)), decode=((1.0, 0.5),))
    assert asked(beside(None, cost=dearer_beyond_32), ttft_s=ttft_s) == Step(1, tokens)


@pytest.mark.parametrize("waits, tokens", [(20.0, 32), (30.0, 63)])
def test_a_prompt_presses_too_when_it_has_waited_for_three_times_its_own_work(waits, tokens):
    """It is 9 s of work, and half of its limit is 500 s."""
    dearer_beyond_32 = Cost(prefill=((0.0, 0.5), (32.0, 2.5), (64.0, 5.4)), decode=((1.0, 0.5),))
    told = beside(None, cost=dearer_beyond_32)
    assert asked(told, ttft_s=1000.0) == Step(1, 32)
    told.now += waits
    told.step()
    assert only(told.later(), Step) == [Step(1, tokens)]


def test_a_chunk_ends_a_prompt_where_that_is_in_time():
    told = beside()  # 3.8 s ahead
    assert asked(told, prompt=40) == Step(1, 40) and told.chunk() == [("a", 0, 40)]
    two = beside()
    two.tell(assign("b", 20, max_tokens=4))
    assert asked(two, prompt=25) == Step(1, 45) and two.chunk() == [("b", 0, 20), ("a", 0, 25)]


def test_only_as_many_decodes_as_prompts_press_may_miss_theirs():
    told = beside(usual=True)
    told.land("y", number=3, max_tokens=90, tpot_s=2.0)
    told.step()
    told.now += 57.8
    assert asked(told, ttft_s=-9.0).chunk < 63


def test_the_deeper_in_a_prompt_the_smaller_the_chunk():
    deep = Cost(COST.prefill, COST.decode, prefill_start_s=0.002)
    told = beside(cost=deep)
    assert asked(told) == Step(1, 32)
    told.step()  # 5.7 s ahead: 32 tokens after the first 32 take 4.5 s, and 63 would take 8.5
    assert only(told.later(), Step) == [Step(1, 32)] and told.chunk() == [("a", 32, 64)]


def test_a_flip_begins_and_ends_it():
    told = beside(role="mixed")
    assert asked(told) == Step(1)
    told.tell(flip("auto"))
    told.step()
    assert only(told.later(), Step)[0].chunk is not None
    told.tell(flip("mixed", 9))
    told.step()
    assert only(told.later(), Step) == [Step(1)]


def test_what_is_not_in_the_batch_takes_no_time_from_its_steps(monkeypatch):
    """A prompt that will decode here, and KV on its way here: the next step has the context of the decode only."""
    seen = []
    monkeypatch.setattr("tetri.core.worker.chunk_limit.limit", lambda step, *_: seen.append(step) or 16)
    told = beside()
    told.tell(offer("far", prompt=40, offer=7, src="p1"))
    asked(told, prompt=300)
    told.step()
    told.later()
    (running,) = told.core.decode.batch.running.values()
    assert [(step.batch, step.context) for step in seen[-2:]] == [(1, running.size - 1), (1, running.size)]


@pytest.mark.parametrize("blocks, tokens", [(200, 63), (40, 32)])
def test_a_prompt_without_memory_presses_nobody(blocks, tokens):
    dearer_beyond_32 = Cost(prefill=((0.0, 0.5), (32.0, 2.5), (64.0, 5.4)), decode=((1.0, 0.5),))
    told = beside(None, cost=dearer_beyond_32, capacity=LARGE.changed(blocks=blocks, context=160))
    assert asked(told, prompt=156, ttft_s=-9.0) == Step(1, tokens)


# ---------------------------------------------------------------- the slack of its decodes

LONG = 60  # tokens
STEPS = {"cost": Cost(decode=((1.0, 0.2),)), "capacity": capacity(blocks=60, context=200, max_batch=4)}


def slack(told, after=0.0, skipped=0):
    """So long after now."""
    core = told.core
    running = core.decode.batch.running.values()
    step_s = core.cost.decode_s(len(running), sum(request.size for request in running))
    return core.chunk_limit.slack_s(step_s, told.now + after, skipped)


def limited(*limits, tokens=2, **changes):
    """Requests with these limits of TPOT, with so many tokens since their first one a moment ago."""
    told = working("d1", "p1", **{"stream_interval": 1, "reserve_share": 1.0, **STEPS, **changes})
    told.later(1.0)
    for place, limit_s in enumerate(limits):
        told.land(f"r{place}", number=place + 1, max_tokens=LONG, tpot_s=limit_s)
    for _ in range(tokens - 1):
        told.step()
    return told


def test_without_a_limit_a_step_may_take_any_time():
    assert slack(limited(tokens=1)) == slack(limited(None)) == inf


def test_a_step_may_take_the_time_that_its_decodes_are_ahead():
    told = limited(1.0)
    ahead_s = 2 * AIMED * 1.0
    assert slack(told) == pytest.approx(ahead_s)
    assert slack(told, 1.5) == pytest.approx(ahead_s - 1.5)
    assert slack(told, ahead_s - 0.1) == inf  # its limit is lost, whatever the step takes
    told.step()
    assert slack(told) == pytest.approx(ahead_s + AIMED)


def test_of_many_decodes_the_one_that_is_least_ahead_counts_and_some_are_skipped():
    told = limited(3.0, None, 2.0, 1.0)
    ahead = [2 * AIMED * 1.0, 3 * AIMED * 2.0, 5 * AIMED * 3.0]
    assert [slack(told, skipped=skipped) for skipped in range(4)] == [*map(pytest.approx, ahead), inf]
    assert slack(told, 2.0) == pytest.approx(ahead[1] - 2.0)  # the limit of the last one is lost


def test_decodes_catch_up_with_what_they_usually_write_yet():
    told = limited(1.0)
    told.core.decode.forecast.learn(40)
    ahead_s, more = 2 * AIMED, EXPECTED * 40
    assert slack(told) == pytest.approx(ahead_s + more * (AIMED * 1.0 - 0.2))
    assert slack(told, 3.0) == pytest.approx(ahead_s + more * (AIMED * 1.0 - 0.2) - 3.0)
    slow = limited(1.0, cost=Cost(decode=((1.0, 0.99),)))  # steps take longer than what it aims at
    slow.core.decode.forecast.learn(40)
    assert slack(slow) == pytest.approx(ahead_s + more * GAINED * AIMED * 1.0)
