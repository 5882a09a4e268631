"""The log probabilities of an output: equal to what was added, in little memory."""

import tracemalloc
from array import array
from math import inf

import pytest

from tetri.core.broker.logprobs import Logprobs
from tetri.core.broker.requests import LOGPROB_BYTES, TOP_BYTES
from tetri.request import TokenLogprob

TOKENS = [
    TokenLogprob(5, -0.1, {5: -0.1, 9: -2.5}),
    TokenLogprob(6, -3.0000000001, {}),
    TokenLogprob(7, -inf, {4294967295: -0.25, 1: -inf, 3: -9.0}),
]


def kept(tokens=TOKENS):
    made = Logprobs(array("I", [token.id for token in tokens]))
    made.add(tokens)
    return made


@pytest.mark.parametrize("part", [slice(0, 3), slice(1, 2), slice(2, 9), slice(3, 3)], ids=str)
def test_a_part_of_it_is_what_was_added(part):
    found = kept()[part]
    assert found == TOKENS[part]
    assert [[*token.top] for token in found] == [[*token.top] for token in TOKENS[part]]  # in this order


@pytest.mark.parametrize("tokens", [0, 1, 2, 3])
def test_what_was_cut_off_is_gone_and_others_may_follow(tokens):
    made = kept()
    made.cut(tokens)
    assert made[0:9] == TOKENS[:tokens]
    made._ids[tokens:] = array("I", [8])
    made.add([TokenLogprob(8, -1.0, {8: -1.0})])
    assert made[0:9] == [*TOKENS[:tokens], TokenLogprob(8, -1.0, {8: -1.0})]


@pytest.mark.parametrize("top", [0, 1, 20])
def test_a_token_takes_no_more_than_it_counts_for(top):
    """With one token more than the most likely ones: the drawn one, when it is not among them."""
    tracemalloc.start()
    made = Logprobs(array("I"))
    for index in range(2000):
        likely = {300 + index + other: -1.5 * index for other in range(top + 1)}
        made.add([TokenLogprob(300 + index, -1.0 * index, likely)])
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size / 2000 <= LOGPROB_BYTES + TOP_BYTES * top
    assert size / 2000 > 0.7 * (LOGPROB_BYTES + TOP_BYTES * top)
