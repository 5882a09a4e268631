"""The queue of a prefill instance."""

import pytest

from tests.core.build import assign, identity, prefill_request
from tetri.core.actions import Broken
from tetri.core.prefill.queue import Queue, groups
from tetri.cost import Cost
from tetri.policy.rules import Rules
from tetri.policy.views import Progress, QueuedPrompt

COST = Cost(prefill=((0.0, 0.0), (100.0, 10.0)))  # a tenth of a second a token


class Line:
    """A queue, and its requests by key."""

    def __init__(self, order, **rules):
        self.queue = Queue(identity("p1", "prefill", rules=Rules(order=order, **rules), cost=COST))
        self.requests = {}

    def enter(self, key, tokens, due=None, pinned=""):
        made = prefill_request(assign(key, tokens), len(self.requests) + 1, COST, due=due)
        made.pinned = pinned
        self.requests[key] = made
        self.queue.enter(made)
        self.check()

    def first(self, tokens=1):
        found = "".join(self.queue.first(tokens))
        self.check()
        return found

    def computed(self, key, tokens):
        self.queue.computed(self.requests[key], tokens)
        self.check()
        return self.queue.tokens, pytest.approx(self.queue.seconds)

    def leave(self, key):
        self.queue.leave(self.requests.pop(key))
        self.check()

    def check(self):
        self.queue.check(self.requests)


def test_windows_are_ordered_when_they_are_wanted_and_never_mix():
    line = Line("sjf", sched_batch=2)
    for key, tokens in (("a", 7), ("b", 5), ("c", 1)):
        line.enter(key, tokens)
    assert line.first(8) == "ba"
    line.enter("d", 2)
    assert line.first(8) == "ba"  # twelve tokens: the second window is not wanted yet, and not ordered
    assert line.first(13) == "bacd" and len(line.queue) == 4
    line.queue.start(line.requests["b"])  # no news: it is in line already
    line.leave("b")
    assert line.first(8) == "acd"


def test_without_windows_whoever_comes_with_a_lower_rank_goes_first_until_the_others_have_started():
    line = Line("ageing", stretch=10.0)
    line.enter("long", 30)
    line.enter("short", 2)
    assert line.first() == "shortlong"
    line.queue.start(line.requests["short"])
    line.enter("shorter", 1)
    assert line.first() == "shortshorterlong"
    line.leave("long")
    line.leave("short")
    assert line.first() == "shorter"


def test_who_has_a_lower_rank_than_what_is_left_of_all_started_ones_overtakes_them():
    line = Line("ageing", stretch=10.0)

    def overtaking():
        return "".join(line.queue.overtaking())

    line.enter("a", 20)
    line.enter("b", 5)
    assert overtaking() == ""  # none has started
    line.queue.start(line.requests["a"])
    line.enter("c", 7)
    assert overtaking() == "bc" and line.first() == "abc"
    line.computed("a", 14)  # six are left
    assert overtaking() == "b"
    line.queue.start(line.requests["b"])
    line.enter("d", 5)
    assert overtaking() == ""  # it came later
    line.enter("e", 4)
    assert overtaking() == "e"


def test_with_windows_nobody_overtakes():
    line = Line("sjf")
    line.enter("a", 20)
    line.first()
    line.queue.start(line.requests["a"])
    line.enter("b", 1)
    assert list(line.queue.overtaking()) == []


def test_work_is_counted_as_it_is_done():
    line = Line("fcfs")
    line.enter("a", 20)
    line.enter("b", 4)
    assert (line.queue.tokens, line.queue.seconds) == (24, pytest.approx(2.4))
    line.first(20)
    assert line.computed("a", 8) == (16, 1.6)
    assert line.computed("a", 0) == (24, 2.4)  # it begins again
    line.leave("a")
    line.leave("b")
    assert (len(line.queue), line.queue.tokens, line.queue.seconds) == (0, 0, 0.0)


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (lambda line: setattr(line.requests["a"].choices[0], "token", 1), "has its token and is still queued"),
        (lambda line: line.queue.raw.clear(), "not all requests without a token are queued"),
        (lambda line: setattr(line.queue, "tokens", 9), "9 tokens queued, 0 in line: counted 4, 0"),
        (lambda line: setattr(line.queue, "seconds", 9.0), "9.0 seconds of work queued, counted 0.4"),
        (lambda line: line.queue.raw.update(a=QueuedPrompt("a", 9, 9)), "the ranks and the queue differ"),
    ],
)
def test_check_finds_what_is_wrong(spoil, complaint):
    line = Line("ageing")
    line.enter("a", 4)
    spoil(line)
    with pytest.raises(Broken, match=complaint):
        line.check()


# ---------------------------------------------------------------- who may share a chunk


@pytest.mark.parametrize(
    ("prompts", "alone", "granted", "expected"),
    [
        ("abc", "", "b", ["abc"]),
        ("sab", "s", "", ["s", ""]),
        ("asb", "s", "", ["a"]),
        ("sab", "s", "b", ["s", "b"]),  # the suspect waits for slots: only granted ones go past it
        ("asb", "s", "s", ["a", "s"]),  # a waits for slots: the granted suspect goes past it, alone
        ("stab", "st", "ta", ["s", "a", "t"]),
        ("ab", "s", "s", ["ab"]),  # it is not among those whose turn it is
    ],
)
def test_suspects_share_no_chunk_and_overtake_as_others_do(prompts, alone, granted, expected):
    requests = {key: prefill_request(assign(key, 4)) for key in "abcst"}
    for number, key in enumerate(granted):
        requests[key].flow.aim(number, "d1", requests[key].choices)
        requests[key].flow.grant()
    for key in alone:
        requests[key].alone = True
    found = list(groups([Progress(key, 0, 4) for key in prompts], requests, requests))
    assert ["".join(each.key for each in group) for group, _ in found] == expected
    assert all("s" not in started for _, started in found[:-1])


@pytest.mark.parametrize("order", ["fcfs", "sjf", "ageing"])
def test_a_canary_comes_after_all_others_in_any_order(order):
    line = Line(order, sched_batch=2)
    line.enter("c", 1, pinned="d1")
    for key in "ab":
        line.enter(key, 5)
    assert line.first(99) == "abc" and len(line.queue) == 3
    line.leave("a")
    line.queue.start(line.requests["c"])
    assert "c" in line.queue.line and not line.queue.canaries  # started ones are not overtaken
    line.leave("c")
    line.enter("c", 1, pinned="d1")
    line.leave("c")
    assert line.first(99) == "b" and len(line.queue) == 1
