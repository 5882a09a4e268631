"""Who enters the running batch."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tetri.policy.admit import MARGIN, greedy, growth_to_peak, next_growth, peak, reserve_dynamic, reserve_static
from tetri.policy.views import BatchMember, BatchView, WaitingRequest
from tetri.request import blocks_for

ONE = (BatchMember(1, 2),)


def request(key, landed, tokens, end, size=1):
    return WaitingRequest(key, landed, blocks_for(tokens, size), tokens, end)


def requests(*lengths, size=1):
    """Of (tokens, end), in the order of landing, named a, b, c …"""
    return [request("abcdefgh"[place], place, *length, size) for place, length in enumerate(lengths)]


@pytest.mark.parametrize(
    "running, max_batch, free_blocks, admitted",
    [(0, 4, 0, ["early", "late"]), (3, 4, 9, ["early"]), (4, 4, 9, []), (5, 4, 9, []), (0, 4, -1, [])],
)
def test_greedy_goes_by_landing_while_slots_last_and_memory_is_not_overdrawn(running, max_batch, free_blocks, admitted):
    waiting = [WaitingRequest("late", 2, 5), WaitingRequest("early", 1, 5)]
    assert greedy(waiting, BatchView(ONE * running, max_batch, free_blocks)) == admitted


@pytest.mark.parametrize("admit", [greedy, reserve_static, reserve_dynamic, peak])
def test_those_whose_next_token_is_late_first_go_first(admit):
    due = {"never": 0.0, "soon": 2.0, "soon too": 2.0, "later": 9.0}
    waiting = [WaitingRequest(key, 9 - place, 1, 1, 2, at) for place, (key, at) in enumerate(due.items())]
    assert admit(waiting, BatchView([], 3, 99)) == ["never", "soon too", "soon"]


@pytest.mark.parametrize("running, kept", [(0, 0), (1, 2), (7, 14)])
def test_two_blocks_are_kept_for_each_running_request(running, kept):
    assert next_growth(running) == kept


def test_static_admits_what_fits_to_its_end_rounded_up_and_blocks_at_the_first_that_does_not():
    """Growth of 2, 2 and 5; the running one's promise of 90 counts for nothing."""
    waiting = requests((3, 5), (6, 8), (1, 6))
    for free, admitted in {9: "abc", 8: "ab", 4: "ab", 3: "a", 2: "a", 1: ""}.items():
        assert reserve_static(waiting[::-1], BatchView((BatchMember(10, 100),), 4, free)) == list(admitted)
    assert reserve_static(waiting, BatchView((BatchMember(10, 100),), 3, 9)) == ["a", "b"]
    waiting = requests((15, 17), (15, 16), (16, 17), size=16)
    assert reserve_static(waiting, BatchView((), 8, 1, 16)) == ["a", "b"]
    assert reserve_static(waiting, BatchView((), 8, 2, 16)) == ["a", "b", "c"]
    rich = WaitingRequest("rich", 0, blocks=9, tokens=3, end=5)
    assert reserve_static([rich, request("poor", 1, 3, 5)], BatchView((), 8, 1)) == ["rich"]


def test_peak_leaves_a_margin():
    """After 30 steps 60 + 30 are taken, the most at any time. Of 90 or 91, one is left alone."""
    waiting = [WaitingRequest("a", 0, blocks=0, tokens=0, end=69)]
    assert [peak(waiting, BatchView((BatchMember(30, 60),), 8, free)) for free in (60, 61)] == [[], ["a"]]


SIZES = st.integers(1, 5)
LENGTHS = st.tuples(st.integers(1, 12), st.integers(0, 12)).map(lambda pair: (pair[0], pair[0] + pair[1]))
BATCH = st.lists(LENGTHS, max_size=7)
WAITING = st.lists(LENGTHS, max_size=5)


def most_ever(requests, size):
    """The largest memory of these (tokens, end), step by step."""
    lives = [(tokens, max(end, tokens + 1)) for tokens, end in requests]
    longest = max((end - tokens for tokens, end in lives), default=0)
    steps = range(1, longest + 1)
    held = (sum(blocks_for(tokens + step, size) for tokens, end in lives if tokens + step <= end) for step in steps)
    return max(held, default=0)


@settings(deadline=None, derandomize=True)
@given(BATCH, WAITING, st.integers(-3, 40), SIZES)
def test_peak_admits_as_many_as_never_overflow_when_all_end_as_predicted(running, waiting, free, size):
    batch = BatchView([BatchMember(*lengths) for lengths in running], len(running) + 3, free, size)
    admitted = peak(requests(*waiting, size=size)[::-1], batch)
    room = free + sum(blocks_for(tokens, size) for tokens, _ in running)
    room -= int(max(room, 0) * MARGIN)
    fits = 0
    for taken in range(1, len(waiting) + 1):
        own = sum(blocks_for(tokens, size) for tokens, _ in waiting[:taken])
        if most_ever([*running, *waiting[:taken]], size) > room + own:
            break
        fits = taken
    assert admitted == list("abc"[:fits])  # there are three slots


@settings(deadline=None, derandomize=True)
@given(BATCH, SIZES)
def test_what_the_batch_will_take_at_its_peak_is_kept_free(running, size):
    batch = BatchView([BatchMember(*lengths) for lengths in running], 99, 95, size)
    held = sum(blocks_for(tokens, size) for tokens, _ in running)
    margin = int((95 + held) * MARGIN)
    assert growth_to_peak(batch) == (max(most_ever(running, size) - held + margin, 0) if running else 0)


@settings(deadline=None, derandomize=True)
@given(BATCH, WAITING, st.integers(-3, 40), SIZES)
def test_dynamic_is_the_papers_rule_taken_one_by_one(running, waiting, free, size):
    batch = BatchView([BatchMember(*lengths) for lengths in running], len(running) + 3, free, size)
    room, there, right = free + sum(blocks_for(tokens, size) for tokens, _ in running), list(running), []
    for key, (tokens, end) in zip("abc", waiting, strict=False):  # there are three slots
        there.append((tokens, end))
        room += blocks_for(tokens, size)
        free -= blocks_for(tokens + 1, size) - blocks_for(tokens, size)
        left = {place: max(end - tokens, 1) for place, (tokens, end) in enumerate(there)}
        soon = min(left.values())
        used = sum(blocks_for(there[place][0] + soon, size) for place, steps in left.items() if steps > soon)
        if used >= room or free < 0:
            break
        right.append(key)
    assert reserve_dynamic(requests(*waiting, size=size)[::-1], batch) == right
