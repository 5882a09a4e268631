"""Where the broker places requests, and how much work it takes them for."""

from random import Random

import pytest

from tests.core.build import WordingTold, capacity, only, ready, sent, tokens
from tetri.core.actions import Submitted, Unword
from tetri.core.broker import Broker
from tetri.core.desk import Limits
from tetri.cost import Cost
from tetri.policy.rules import Rules
from tetri.request import Sampling
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.messages import Assign

LIMITS = Limits(context=40, vocabulary=100, beat_s=0.1, dead_s=5.0, patience_s=10.0)


def submit(key, prompt=3):
    return Submitted(b"c", key, (1,) * prompt, Sampling(max_tokens=1))


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
    assert told.core.table.work_ns["p1"] == work // 2 and not only(ended, Unword)
    told.tell(tokens("p1", "00002a-2", 0, 7, reason="length"))
    assert not told.core.table.work_ns


def test_what_waits_is_placed_when_the_loss_of_another_makes_room_for_it():
    """A prompt that must fit twice into the only decode instance, as long as another one can prefill it: nobody takes
    it while that other is there and too small."""
    told = broker(("m1", "mixed", 10), ("p1", "prefill", 4))
    assert not sent(told.tell(submit("a", 30)), kind=Assign)
    assert [assign.rid for assign in sent(told.tell(PeerDown("p1")), "m1", Assign)] == ["00002a-1"]
