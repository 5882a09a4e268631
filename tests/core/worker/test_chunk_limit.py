"""How large the chunks of an adaptive worker are beside its decodes."""

import pytest

from tests.core.build import assign, capacity, flip
from tests.core.driver import working
from tests.core.reading import only
from tetri.core.actions import Step
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
    """After an output of 20 tokens, 10 of them count: 14 s more."""
    assert asked(beside(), waits=3.0) == Step(1, 0)
    assert asked(beside(usual=True), waits=3.0) == Step(1, 63)
    assert asked(beside(usual=True), waits=14.8) == Step(1, 32)


@pytest.mark.parametrize(
    "ttft_s, tokens",
    [
        (None, 16),
        (32.0, 16),  # less than half of its time is over
        (-9.0, 63),  # it is late: the one decode may be late too
    ],
)
def test_for_each_prompt_that_presses_a_decode_may_miss_its_limit(ttft_s, tokens):
    assert asked(beside(usual=True), ttft_s=ttft_s, waits=15.8) == Step(1, tokens)


@pytest.mark.parametrize("ttft_s, tokens", [(None, 32), (32.0, 32), (-9.0, 63)])
def test_beside_decodes_the_chunk_that_adds_least_a_token_unless_a_prompt_presses(ttft_s, tokens):
    dearer_beyond_32 = Cost(prefill=((0.0, 0.5), (32.0, 2.5), (64.0, 5.0)), decode=((1.0, 0.5),))
    assert asked(beside(None, cost=dearer_beyond_32), ttft_s=ttft_s) == Step(1, tokens)


@pytest.mark.parametrize("waits, tokens", [(20.0, 32), (30.0, 63)])
def test_a_prompt_presses_too_when_it_has_waited_for_three_times_its_own_work(waits, tokens):
    """It is 9 s of work, and half of its limit is 500 s."""
    dearer_beyond_32 = Cost(prefill=((0.0, 0.5), (32.0, 2.5), (64.0, 5.0)), decode=((1.0, 0.5),))
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
    told.now += 15.8
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
