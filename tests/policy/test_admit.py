"""Who enters the running batch."""

import pytest

from tetri.policy.admit import greedy
from tetri.policy.views import BatchView, WaitingSeat

WAITING = [WaitingSeat("late", 2, 5), WaitingSeat("early", 1, 5)]


@pytest.mark.parametrize(
    "batch, admitted",
    [
        (BatchView(running=0, max_batch=4, free_blocks=0), ["early", "late"]),
        (BatchView(running=3, max_batch=4, free_blocks=9), ["early"]),
        (BatchView(running=4, max_batch=4, free_blocks=9), []),
        (BatchView(running=5, max_batch=4, free_blocks=9), []),
        (BatchView(running=0, max_batch=4, free_blocks=-1), []),
    ],
)
def test_greedy_goes_by_landing_while_there_are_slots_and_memory_is_not_overdrawn(batch, admitted):
    assert greedy(WAITING, batch) == admitted


def test_greedy_with_nobody_waiting():
    assert greedy([], BatchView(0, 4, 9)) == []
