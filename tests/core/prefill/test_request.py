"""A request in its prefill phase: what follows from its tokens and its offers."""

import pytest

from tests.core.build import assign, capacity, prefill_request
from tetri.policy.rules import Rules
from tetri.policy.views import Need
from tetri.request import LengthRange, Stage
from tetri.wire.messages import End


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


def test_one_that_its_first_token_ends():
    made = prefill_request(assign("a", 8, [5], max_tokens=2))
    (choice,) = made.choices
    assert made.outputs(choice) == [5]
    choice.token, choice.end = 7, End(reason="length", receipt=made.receipt("p1"))
    assert (made.stage(choice), made.decodes, made.outputs(choice)) == (Stage.DONE, False, [5, 7])
    receipt = choice.end.receipt
    assert (receipt.prefill_instance, receipt.adopted, receipt.transport) == ("p1", 0, "none")
