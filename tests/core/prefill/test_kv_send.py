"""Slots of a prefill instance's store, and memory of decode instances, never wait for each other: event by event, each
order of things in which they could. Three slots, what one chunk may fill, are the reserve here: `slots=7` leaves four
to requests that are not granted."""

import pytest

from tests.core.build import assign, capacity, close, defer, grant, handle, instance, refuse
from tests.core.driver import working
from tests.core.reading import added, only, sent
from tetri.core.actions import Export, Free, Freed, HoldRequest
from tetri.core.prefill.request import KVChunk, KVOutflow
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.handover import Offer
from tetri.wire.load import Load
from tetri.wire.messages import Failed

ROOMY = capacity(blocks=60, context=120, max_batch=4)
D1, D2 = (instance(iid, "decode", capacity=ROOMY) for iid in ("d1", "d2"))


def begin(*decoders, slots=7, **changes):
    return working("p1", *decoders or (D1,), capacity=ROOMY, slots=slots, **changes)


def finish(told, rid):
    """A granted one goes on to its end, whatever the others wait for."""
    for _ in range(20):
        told.take(rid)
        if sum(each.stop - each.start for each in told.announced[rid].values()) == told.asked[rid][1].blocks:
            return
        assert rid in [span[0] for span in told.run()]
    raise AssertionError(f"{rid} does not end")


@pytest.mark.parametrize("gone", [close("a"), assign("a", prompt=8, attempt=2)])
def test_what_is_exported_when_nobody_wants_it_any_more_is_freed(gone):
    told = begin()
    told.tell(assign("a", prompt=8))
    told.exports = False
    (export,) = only(told.step(), Export)
    told.tell(gone)
    told.exports = True
    late = told.result(export)
    assert told.heartbeat().slots_used == 2 and only(told.tell(late), Free) and told.heartbeat().slots_used == 0


@pytest.mark.parametrize("granted, steps", [(False, 2), (True, 3)])
def test_chunks_are_computed_as_far_as_there_are_slots_for_them(granted, steps):
    """Requests that nobody has taken leave the reserve alone; granted ones may fill all slots."""
    told = begin()
    told.tell(assign("a", 40))
    told.later()
    if granted:
        told.answer("a", grant)
    assert [told.run() for _ in range(steps + 1)] == [*([("a", 8 * n, 8 * n + 8)] for n in range(steps)), []]
    assert told.heartbeat().slots_used == 2 * steps


def test_one_that_is_granted_goes_on_while_an_older_one_waits_for_its_memory():
    """Overtaking by refusal: both are on offer, the older one is refused, the younger granted."""
    told = begin()
    told.tell(assign("a", prompt=12), assign("b", prompt=60))
    assert [told.run(), told.run()] == [[("a", 0, 8)], [("a", 8, 12), ("b", 0, 4)]]
    told.answer("a", refuse)
    told.answer("b", grant)
    told.take("b")
    finish(told, "b")
    assert [each.rid for each in sent(told.meet(D1), kind=Offer)] == ["a"]


def test_not_while_another_is_on_offer_nowhere():
    """It would only keep memory of the engine: nobody is overtaken."""
    told = begin(slots=6)
    told.view(d1=Load(free_blocks=0, deferred_blocks=60))
    told.tell(assign("a", prompt=12), assign("b", prompt=16))
    assert [told.run(), told.run(), told.run()] == [[("a", 0, 8)], [("a", 8, 12)], []]
    assert sent(told.view(d1=60), "d1", Offer)
    assert added(told.later()) == ["p:b:1"]


def test_slots_that_somebody_still_writes_are_waited_for():
    """Nobody wants them any more, but they are not free: they count for all, and come back by themselves."""
    told = begin()
    told.frees = False
    told.tell(assign("z", prompt=12))
    told.run(), told.run()
    told.tell(close("z"), assign("a", prompt=60))
    told.run(), told.run()
    told.answer("a", grant)
    assert told.run() == []
    told.tell(Freed(3), PeerUp("d1"))
    assert told.run() == [("a", 16, 24)]


def test_kv_of_a_prompt_that_its_first_token_ends_makes_room():
    told = begin()
    told.tell(assign("a", prompt=20), assign("b", prompt=16))
    told.run(), told.run()
    told.answer("a", grant)
    told.later()
    assert told.chunk() == [("a", 16, 20), ("b", 0, 4)]
    told.step(a="stop")
    assert told.heartbeat().slots_used == 1 and told.run() == [("b", 4, 12)]


def test_a_granted_one_goes_past_one_that_waits_for_slots():
    """`k` waits to be taken, with three slots. `a` and `b` are started behind it: the step that would have ended `a`
    ran neither, since memory was short. Then the decode instance is lost that had granted `k` its memory."""
    told = working("p1", "d1", "d2", capacity=capacity(blocks=40, context=100, max_batch=4), slots=6)
    told.running("x", "y", max_tokens=20)
    told.tell(assign("k", prompt=12), assign("a", prompt=8), assign("b", prompt=28))
    told.step()
    told.answer("k", grant)
    assert [told.run(), told.run()] == [[("k", 6, 12)], [("a", 0, 6)]]
    told.later()
    assert told.chunk() == [("a", 6, 8), ("b", 0, 4)]
    told.step(spans=[], preempted="x")
    told.tell(PeerDown("d1"))
    told.later()
    assert told.chunk() == []
    told.answer("b", grant)
    told.step()
    assert only(told.later(), HoldRequest) == [HoldRequest("p:b:1", False)] and told.chunk() == [("b", 0, 6)]


@pytest.fixture
def lost():
    """`k` was granted, and its three blocks wait to be taken, when its decode instance is lost. `b` is granted by
    another one, and waits for slots, all of which are kept for `k` and `a`, which nobody takes."""
    told = begin(D1, D2, slots=6)
    told.tell(assign("k", prompt=12))
    told.run()
    told.answer("k", grant)
    told.tell(assign("a", prompt=12), assign("b", prompt=24))
    told.run(), told.run(), told.run()
    assert told.run() == []
    told.view(d1=0, d2=0)
    told.answer("a", refuse)
    told.answer("b", refuse)
    told.tell(PeerDown("d1"))
    return told


def granted(told, rid, answer=refuse):
    """They are offered again, and one of them is granted; the others get the other answer."""
    told.view(d2=60)
    for each in "kab":
        told.answer(each, grant if each == rid else answer)
    told.later()


def failures(told):
    """What fails at the next beat."""
    return [(each.rid, each.retry) for each in sent(told.later(0.1), kind=Failed)]


@pytest.mark.parametrize("answer", [refuse, defer])
def test_one_whose_grant_came_to_nothing_is_given_up_when_a_granted_one_needs_its_slots(lost, answer):
    """Nothing else would bring them back: what `k` and `a` wait for may be the memory that `b` was granted."""
    granted(lost, "b", answer)
    assert failures(lost) == [("k", True)]
    finish(lost, "b")


def test_it_is_kept_while_nobody_needs_its_slots(lost):
    assert failures(lost) == []
    granted(lost, "k")
    assert failures(lost) == []
    lost.take("k")
    assert lost.run() == []
    lost.view(d2=60)
    lost.answer("b", grant)
    finish(lost, "b")


def test_it_is_kept_while_it_is_on_offer(lost):
    granted(lost, "b")
    lost.view(d2=60)
    assert failures(lost) == []
    lost.answer("k", refuse)
    assert failures(lost) == [("k", True)]


def test_aiming_elsewhere_asks_anew_and_a_lost_grant_is_remembered_until_the_next():
    flow = KVOutflow(1)
    for number, target in ((1, "d1"), (2, "d2")):
        flow.aim(number, target, [])
        assert (flow.offer, flow.target, flow.granted) == (number, target, False)
        if number == 1:
            flow.grant()
        else:
            flow.land(0)  # a chunk lands only after a grant
        assert not flow.grant_lost
        flow.clear_aim()
        assert (flow.offer, flow.target, flow.granted, flow.grant_lost) == (None, "", False, True)


def test_what_is_given_up_is_freed_once():
    flow = KVOutflow(2)
    flow.put(KVChunk(0, 0, 2, handle(0, 1), 9))
    assert (flow.drain(), flow.drain()) == ([handle(0, 1)], [])
