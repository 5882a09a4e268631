"""Where the broker places requests, how much work it takes them for, and which lost attempts count against them."""

from random import Random

import pytest

from tests.core.build import WordingTold, capacity, heartbeat, only, ready, sent, staged, tokens
from tetri.core.actions import Release, Reply, Submitted
from tetri.core.broker.broker import Broker
from tetri.core.broker.delivery import Limits
from tetri.cost import Cost
from tetri.policy.rules import Rules
from tetri.request import Sampling, Stage
from tetri.wire.clients import Done
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.messages import Assign

LIMITS = Limits(context=40, vocabulary=100, heartbeat_s=0.1, dead_s=5.0, patience_s=10.0)


def submit(key, prompt=3, max_tokens=1):
    return Submitted(b"c", key, (1,) * prompt, Sampling(max_tokens=max_tokens))


def broker(*there, cost=None):
    """`there` are (iid, role, blocks of 4 tokens)."""
    told = WordingTold(Broker(LIMITS, Rules(), epoch=42, rng=Random(1), now=0.0, cost=cost or Cost(), chunk_tokens=8))
    for iid, role, blocks in there:
        told.tell(ready(iid, role, capacity=capacity(blocks=blocks)), PeerUp(iid))
    return told


@pytest.mark.parametrize("seconds", [1e-300, 1e-12, 1e300, 1.7e308])
def test_times_too_short_or_too_long_to_count_are_counted_all_the_same(seconds):
    told = broker(("p1", "prefill", 10), ("d1", "decode", 10), cost=Cost(prefill=((1.0, seconds),)))
    told.tell(submit("a", 20), submit("b", 20))
    work = told.core.table.work_ns["p1"]
    assert work >= 2
    ended = told.tell(tokens("p1", "00002a-1", 0, 7, reason="length"))
    assert told.core.table.work_ns["p1"] == work // 2 and only(ended, Release)
    told.tell(tokens("p1", "00002a-2", 0, 7, reason="length"))
    assert not told.core.table.work_ns


def test_what_waits_is_placed_when_the_loss_of_another_makes_room_for_it():
    """A prompt that must fit twice into the only decode instance, as long as another one can prefill it: nobody takes
    it while that other is there and too small."""
    told = broker(("m1", "mixed", 10), ("p1", "prefill", 4))
    assert not sent(told.tell(submit("a", 30)), kind=Assign)
    assert [assign.rid for assign in sent(told.tell(PeerDown("p1")), "m1", Assign)] == ["00002a-1"]


# ---------------------------------------------------------------- which lost attempts count


def rows(told):
    return {row.key: row for row in told.core.table.active()}


def lose(told, iid):
    """It dies and comes back: the errors with which requests ended."""
    actions = told.tell(PeerDown(iid), PeerUp(iid), heartbeat(iid))
    return [reply.message.error for reply in only(actions, Reply) if isinstance(reply.message, Done)]


def begin(told, *keys):
    """The instances where these are say that they work on them."""
    for key in keys:
        row = rows(told)[key]
        told.tell(staged(row.prefill, row.rid, Stage.PREFILL, row.attempt))


def counted(told):
    return {key: row.attempt - row.not_counted for key, row in rows(told).items()}


@pytest.fixture
def pair():
    told = broker(("p1", "prefill", 10), ("d1", "decode", 10))
    told.tell(submit("worked", max_tokens=3), submit("waited", max_tokens=3))
    begin(told, "worked")
    return told


def test_a_request_that_only_waited_on_a_lost_worker_keeps_its_attempts(pair):
    for _ in range(LIMITS.max_attempts - 1):
        assert not lose(pair, "p1")
        begin(pair, "worked")
    (error,) = lose(pair, "p1")
    assert error == "given up after 8 attempts: p1: connection lost"
    assert counted(pair) == {"waited": 1} and rows(pair)["waited"].attempt == 9


def test_an_attempt_that_has_begun_counts_whoever_else_was_there(pair):
    begin(pair, "waited")
    lose(pair, "p1")
    assert counted(pair) == {"worked": 2, "waited": 2}


def test_where_nothing_is_known_to_have_begun_all_attempts_count(pair):
    """Or what kills its worker before anybody hears of it would do so for ever."""
    lose(pair, "p1")
    assert counted(pair) == {"worked": 2, "waited": 1}
    errors = [error for _ in range(LIMITS.max_attempts) for error in lose(pair, "p1")]
    assert errors == [
        "given up after 8 attempts: p1: connection lost",
        "given up after 9 attempts (1 lost while it only waited): p1: connection lost",
    ]


def test_what_waits_for_its_turn_to_decode_is_spared_too(pair):
    begin(pair, "waited")
    for key, stage in (("worked", Stage.DECODE), ("waited", Stage.WAITING)):
        row = rows(pair)[key]
        pair.tell(tokens("p1", row.rid, 0, 7), staged("d1", row.rid, Stage.WAITING), staged("d1", row.rid, stage))
    lose(pair, "d1")
    assert counted(pair) == {"worked": 2, "waited": 1}


def test_one_that_kills_its_worker_again_and_again_takes_none_with_it_that_wait_behind_it():
    told = broker(("p1", "prefill", 10), ("p2", "prefill", 10), ("d1", "decode", 10))
    told.tell(*(submit(str(number)) for number in range(10)))
    deaths = 0
    while "0" in rows(told):
        begin(told, "0")
        lose(told, rows(told)["0"].prefill)
        deaths += 1
    assert deaths == LIMITS.max_attempts
    assert counted(told) == {str(number): 1 for number in range(1, 10)}
