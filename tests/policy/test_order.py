"""The order in which prompts are prefilled."""

from tetri.policy.order import fcfs
from tetri.policy.views import QueuedPrompt


def test_first_come_first_served():
    window = [QueuedPrompt("b", 2, 1), QueuedPrompt("a", 1, 900), QueuedPrompt("c", 3, 5)]
    assert fcfs(window) == ["a", "b", "c"] and fcfs([]) == []
