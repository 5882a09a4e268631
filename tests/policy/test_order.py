"""The order in which prompts are prefilled."""

import pytest

from tetri.policy.order import fcfs, ljf, sjf
from tetri.policy.views import QueuedPrompt


def test_first_come_first_served():
    window = [QueuedPrompt("b", 2, 1), QueuedPrompt("a", 1, 900), QueuedPrompt("c", 3, 5)]
    assert fcfs(window) == ["a", "b", "c"] and fcfs([]) == []


@pytest.mark.parametrize(("order", "right"), [(sjf, ["e", "c", "b", "d", "a"]), (ljf, ["a", "b", "d", "c", "e"])])
def test_by_length_and_among_equals_by_arrival(order, right):
    lengths = {"a": 900, "b": 7, "c": 5, "d": 7, "e": 1}
    window = [QueuedPrompt(key, arrival, tokens) for arrival, (key, tokens) in enumerate(lengths.items())]
    assert order(window) == order(window[::-1]) == right and order([]) == []
