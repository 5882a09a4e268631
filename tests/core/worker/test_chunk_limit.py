"""How large the chunks of an adaptive worker are beside its decodes."""

import pytest

from tests.core.build import assign, capacity, flip
from tests.core.driver import working
from tests.core.reading import only
from tetri.core.actions import Step
from tetri.core.worker.chunk_limit import EARLY, LATE
from tetri.cost import Cost
from tetri.request import Slo

# A chunk of n tokens takes half a second and n sixteenths, a decode step half a second, both together as the chunk.
COST = Cost(prefill=((0.0, 0.5), (64.0, 4.5)), decode=((1.0, 0.5),))
LARGE = capacity(blocks=200, context=400, chunk_tokens=64, max_batch=4)
USUAL = 7  # tokens of an output, where one has ended


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


def test_a_prompt_that_would_be_late_gets_what_the_decodes_can_catch_up_with():
    """16 tokens a step are 11 a second, 32 are 13, and 63 are 14."""
    for left_s, tokens in ((1e6, 32), (EARLY * 100 / 12.0, 32), (EARLY * 100 / 13.0, 63)):
        assert asked(beside(usual=True), ttft_s=left_s) == Step(1, tokens)
    assert asked(beside(), ttft_s=1.0) == Step(1, 32)  # nothing is known of how much they write


def test_all_prompts_before_the_one_that_would_be_late_count():
    told = beside(usual=True)
    told.tell(assign("b", 60, max_tokens=4))
    assert asked(told, 40, ttft_s=EARLY * 100 / 13.0) == Step(1, 63)


def test_a_prompt_that_is_late_is_computed_in_a_share_of_its_limit():
    for limit_s, tokens in ((EARLY * 100 / 13.0 / LATE, 63), (EARLY * 100 / 12.0 / LATE, 32)):
        assert asked(beside(usual=True), ttft_s=-limit_s) == Step(1, tokens)


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
