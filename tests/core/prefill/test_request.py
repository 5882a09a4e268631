"""A request in its prefill phase: what follows from its tokens and its offers."""

import pytest

from tests.core.build import assign, capacity, prefill_request
from tetri.policy.rules import Rules
from tetri.policy.views import Need
from tetri.request import LengthRange, Stage


@pytest.mark.parametrize(
    "prompt, output, most, fits",
    [(36, 0, 4, True), (37, 0, 4, False), (39, 0, 1, True), (40, 0, 1, False), (30, 9, 10, True), (30, 10, 10, False)],
)
def test_all_of_it_must_fit_and_one_token_more_into_the_context(prompt, output, most, fits):
    """Ten blocks of four tokens, a context of 40."""
    assert prefill_request(assign("a", prompt, [5] * output, max_tokens=most)).fits(capacity()) == fits


@pytest.mark.parametrize(
    "length, rules, end_blocks, heavy",
    [
        (None, {}, 12, False),  # all that it may write
        ((4, 12), {"dispatch_end": "low"}, 3, False),
        ((4, 12), {"dispatch_end": "high"}, 5, False),
        ((4, 12), {"heavy_tokens": 4}, 5, True),
        ((0, 1), {}, 3, False),  # the output of earlier attempts, and two more at least
        ((30, 90), {"dispatch_end": "low"}, 10, True),
    ],
)
def test_what_it_needs_follows_from_the_end_of_its_range(length, rules, end_blocks, heavy):
    made = prefill_request(assign("a", 8, [5], max_tokens=40))
    made.length = None if length is None else LengthRange(low=length[0], high=length[1])
    own = Rules(**{"dispatch_end": "high", "heavy_tokens": 20, **rules})
    assert made.need(own, 4) == Need(3, end_blocks, heavy)


def test_blocks_are_filled_as_tokens_are_computed_and_none_of_one_that_its_first_token_ends():
    made = prefill_request(assign("a", 10))
    assert [made.filled(tokens, 4) for tokens in (3, 4, 9, 10)] == [0, 1, 2, 3]
    made.flow.exported = 2
    assert made.filled(0, 4) == 2  # it began again
    assert prefill_request(assign("b", 10, max_tokens=1)).filled(10, 4) == 0


def test_its_stage_its_outputs_and_whether_it_waits_for_a_place():
    made = prefill_request(assign("a", 8, [5]))
    assert (made.stage, made.outputs(), made.unplaced) == (Stage.QUEUED, [5], False)
    made.running, made.turn = True, 1
    assert (made.stage, made.unplaced, made.granted) == (Stage.PREFILL, True, False)
    made.flow.aim(1, "d1")
    assert not made.unplaced and not made.granted
    made.flow.grant()
    made.running, made.token = False, 7
    assert (made.stage, made.outputs(), made.granted, made.decodes) == (Stage.MOVING, [5, 7], True, True)
