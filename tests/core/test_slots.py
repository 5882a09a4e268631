"""Slots of a prefill instance's slab and memory of decode instances never wait for each other: event by event, each
order of things in which they could, and whole clusters with little of both. Three slots, what one chunk may fill, are
the reserve here: `slots=7` leaves four to requests that are not granted."""

import os

import pytest

from tests.core import test_mixed
from tests.core.build import assign, capacity, grant, instance, kinds, landed, membership, only, refuse, sent, view
from tests.core.cluster import Cluster
from tests.core.shapes import Faults, Shape
from tests.core.test_prefill import start
from tetri.core.actions import AddRequest, Broken, HoldRequest
from tetri.engine_request import Sampled, Span, StepDone
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.handover import Offer
from tetri.wire.messages import Close, Failed

ROOMY = capacity(blocks=60, context=120, max_batch=4)
SEEDS = int(os.environ.get("TETRI_SEEDS", "300")) // 8
FIRST = int(os.environ.get("TETRI_FIRST_SEED", "0"))


def begin(*decoders, slots=7, **changes):
    """A prefill instance whose decode instances have room, as far as it knows."""
    told = start((), capacity=ROOMY, slots=slots, **changes)
    see(told, 2, *decoders or ("d1",))
    return told


def see(told, number, *decoders):
    others = [instance(iid, "decode", capacity=ROOMY) for iid in decoders]
    actions = told.tell(
        view(number, **dict.fromkeys(decoders, 60)), membership(number, instance("p1", "prefill"), *others)
    )
    return actions + told.tell(*[PeerUp(iid) for iid in decoders if iid not in told.core.peers.up])


def request(told, rid):
    return told.core.prefill.requests[f"p:{rid}:1"]


def run(told):
    """Run the planned chunk, if there is one; says what it is."""
    actions = told.later()
    spans = tuple(told.core.prefill.expected)
    if not spans:
        assert "Step" not in kinds(actions)
        return []
    ended = [Sampled(span.key, (7,), None) for span in spans if span.stop == told.core.prefill.requests[span.key].goal]
    told.tell(StepDone(spans, tuple(ended)))
    return [(span.key.split(":")[1], span.start, span.stop) for span in spans]


def answer(told, made, rid):
    """A decode instance grants or refuses what is on offer."""
    flow = request(told, rid).flow
    return told.tell(made(rid, flow.offer, flow.target))


def land(told, rid):
    """All that was announced is taken."""
    flow = request(told, rid).flow
    return told.tell(*[landed(rid, index, flow.offer, flow.target) for index in list(flow.in_flight)])


def finish(told, rid):
    """A granted one goes on to its end, whatever the others wait for."""
    for _ in range(20):
        land(told, rid)
        if request(told, rid).flow.complete:
            return
        assert rid in [span[0] for span in run(told)]
    raise AssertionError(f"{rid} does not end")


# ---------------------------------------------------------------- who may fill what


def test_requests_that_nobody_has_taken_leave_the_reserve_alone():
    told = begin()
    told.tell(assign("a", prompt=40))
    assert [run(told), run(told), run(told)] == [[("a", 0, 8)], [("a", 8, 16)], []]
    assert told.core.prefill.slots_used == 4 and told.core.prefill.short
    answer(told, grant, "a")
    assert run(told) == [("a", 16, 24)] and told.core.prefill.slots_used == 6
    finish(told, "a")


def test_a_granted_request_may_fill_all_slots():
    told = begin(slots=6)
    told.tell(assign("a", prompt=40))
    told.later()
    told.core.stepping = False
    answer(told, grant, "a")
    assert [run(told) for _ in range(4)][-1] == [] and told.core.prefill.slots_used == 6


def test_the_reserve_does_not_stop_prompts_from_being_packed():
    told = begin(slots=30)
    told.tell(assign("a", prompt=10), assign("b", prompt=3), assign("c", prompt=20))
    assert [run(told), run(told)] == [[("a", 0, 8)], [("a", 8, 10), ("b", 0, 3), ("c", 0, 3)]]


def test_what_needs_no_slots_is_computed_whatever_is_taken():
    told = begin()
    told.tell(assign("a", prompt=16, max_tokens=4), assign("b", prompt=20, max_tokens=1))
    run(told), run(told)
    assert told.core.prefill.kv_send.spare().open == 0
    assert [run(told), run(told), run(told)] == [[("b", 0, 8)], [("b", 8, 16)], [("b", 16, 20)]]


# ---------------------------------------------------------------- orders of things that once were a jam


def test_one_that_is_granted_goes_on_while_an_older_one_waits_for_its_memory():
    """Overtaking by refusal: both are on offer, the older one is refused, the younger granted."""
    told = begin()
    told.tell(assign("a", prompt=12), assign("b", prompt=60))
    assert [run(told), run(told)] == [[("a", 0, 8)], [("a", 8, 12), ("b", 0, 4)]]
    answer(told, refuse, "a")
    answer(told, grant, "b")
    land(told, "b")
    assert request(told, "a").unplaced and request(told, "b").flow.landed
    finish(told, "b")
    assert [each.rid for each in sent(see(told, 3, "d1"), kind=Offer)] == ["a"]


def test_one_that_is_granted_late_goes_on():
    """All that the others may have is taken when the grant comes, and none of theirs will be."""
    told = begin()
    told.tell(assign("a", prompt=12), assign("b", prompt=60))
    run(told), run(told)
    assert run(told) == [] and not request(told, "b").granted
    answer(told, refuse, "a")
    assert run(told) == []
    answer(told, grant, "b")
    finish(told, "b")


def test_one_that_finds_no_open_slot_is_offered_all_the_same():
    """Else it could not be granted, and nobody could use the reserve."""
    told = begin(slots=3)
    told.tell(assign("a", prompt=16))
    actions = told.later()
    assert kinds(actions) == ["AddRequest", "Staged > broker", "Offer > d1"] and not told.core.prefill.expected
    assert told.core.prefill.blocked() is request(told, "a")
    answer(told, grant, "a")
    finish(told, "a")


def test_not_while_another_is_on_offer_nowhere():
    """It would only keep memory of the engine: nobody is overtaken."""
    told = begin("d1", slots=6)
    told.tell(view(9, d1=0), assign("a", prompt=12), assign("b", prompt=16))
    assert [run(told), run(told), run(told)] == [[("a", 0, 8)], [("a", 8, 12)], []]
    assert not request(told, "b").turn
    see(told, 10, "d1")
    assert [engine_request.request.key for engine_request in only(told.later(), AddRequest)] == ["p:b:1"]


def test_those_that_fit_nowhere_do_not_keep_the_others_from_being_offered():
    """They keep their slots until one comes that can take them."""
    told = begin("d1", slots=6)
    told.tell(assign("a", prompt=12, max_tokens=8))
    run(told), run(told)
    told.tell(PeerDown("d1"))
    assert list(told.core.dispatcher.unplaceable) == ["p:a:1"]
    told.tell(assign("b", prompt=4, max_tokens=1), assign("c", prompt=16))
    assert run(told) == [("b", 0, 4)]
    told.core.dispatcher.pool.fits = lambda each: each.rid == "c"
    told.later()
    assert request(told, "c").turn and request(told, "c").running


def test_slots_come_back_when_the_broker_closes_those_who_keep_them():
    told = begin()
    told.tell(assign("a", prompt=16), assign("b", prompt=16))
    run(told), run(told)
    assert run(told) == []
    told.tell(Close(rid="a", attempt=1))
    assert run(told) == [("b", 0, 8)]


def test_slots_that_somebody_still_writes_are_waited_for():
    """Nobody wants them any more, but they are not free: they count for all, and come back by themselves."""
    told = begin()
    told.tell(assign("a", prompt=60))
    run(told), run(told)
    answer(told, grant, "a")
    told.core.prefill.kv_send.used += 3  # let go by their request, not by the writer
    assert run(told) == []
    told.core.prefill.kv_send.freed(3)
    told.core.idle = False
    assert run(told) == [("a", 16, 24)]
    told.core.prefill.kv_send.check(told.core.prefill.requests.values())


def test_kv_of_a_prompt_that_its_first_token_ends_makes_room():
    told = begin()
    told.tell(assign("a", prompt=20), assign("b", prompt=16))
    run(told), run(told)
    answer(told, grant, "a")
    told.later()
    spans = tuple(told.core.prefill.expected)
    assert spans[0] == Span("p:a:1", 16, 20) and len(spans) == 2
    told.tell(StepDone(spans, (Sampled("p:a:1", (7,), "stop"),)))
    assert told.core.prefill.slots_used == 1 and run(told) == [("b", 4, 12)]


def two_started():
    """`k` waits to be taken, with three slots. `a` and `b` are started behind it: the step that would have ended `a`
    ran neither, since memory was short. Then the decode instance is lost that had granted `k` its memory."""
    told = test_mixed.start(role="prefill", others=[("d1", "decode"), ("d2", "decode")], slots=6)
    running = test_mixed.decoding(told)
    told.tell(assign("k", prompt=12), assign("a", prompt=8), assign("b", prompt=28))
    told.step()
    answer(told, grant, "k")
    told.step()
    told.later()
    assert spans(told) == [("a", 2, 8), ("b", 0, 1)]
    told.tell(StepDone(preempted=(running,)), PeerDown("d1"))
    assert [request(told, rid).flow.target for rid in "kab"] == ["d2", "", "d2"] and request(told, "k").flow.grant_lost
    return told


def spans(told):
    return [(span.key.split(":")[1], span.start, span.stop) for span in told.core.prefill.expected]


def test_a_granted_one_goes_past_one_that_waits_for_slots():
    told = two_started()
    told.later()
    assert spans(told) == []
    told.core.stepping = False
    answer(told, grant, "b")
    assert only(told.later(), HoldRequest) == [HoldRequest("p:b:1", False)] and spans(told) == [("b", 0, 8)]


# ---------------------------------------------------------------- grants that come to nothing


def lost():
    """`k` was granted, and its three blocks wait to be taken, when its decode instance is lost. `b` is granted by
    another one, and waits for slots, all of which are kept for `k` and `a`, which nobody takes."""
    told = begin("d1", "d2", slots=6)
    told.tell(assign("k", prompt=12))
    run(told)
    answer(told, grant, "k")
    told.tell(assign("a", prompt=12), assign("b", prompt=24))
    run(told), run(told), run(told)
    assert run(told) == [] and request(told, "b").running
    told.tell(view(5, d1=0, d2=0))
    for rid in "ab":
        told.core.dispatcher.refused(request(told, rid), "full")
    told.tell(PeerDown("d1"))
    assert [request(told, rid).unplaced for rid in "kab"] == [True] * 3
    return told


def granted(told, rid):
    """It is offered again and granted; the others are refused."""
    see(told, 6, "d2")
    for each in "kab":
        answer(told, grant if each == rid else refuse, each)
    told.later()


def failures(told):
    """What fails at the next beat."""
    told.core.stepping = False
    return [(each.rid, each.retry) for each in sent(told.later(0.1), kind=Failed)]


def test_one_whose_grant_came_to_nothing_is_given_up_when_a_granted_one_needs_its_slots():
    """Nothing else would bring them back: what `k` and `a` wait for may be the memory that `b` was granted."""
    told = lost()
    granted(told, "b")
    assert told.core.prefill.short and failures(told) == [("k", True)]
    finish(told, "b")


def test_it_is_kept_while_nobody_needs_its_slots():
    told = lost()
    assert failures(told) == []
    granted(told, "k")
    assert failures(told) == [] and not request(told, "k").flow.grant_lost
    land(told, "k")
    assert run(told) == []
    see(told, 7, "d2")
    answer(told, grant, "b")
    finish(told, "b")


def test_it_is_kept_while_it_is_on_offer_or_slots_come_back():
    told = lost()
    granted(told, "b")
    see(told, 7, "d2")
    assert request(told, "k").flow.offer is not None
    assert failures(told) == []
    answer(told, refuse, "k")
    told.core.prefill.kv_send.keeping["p:b:1"] = request(told, "b")
    assert told.core.prefill.slot_deadlock() is None
    del told.core.prefill.kv_send.keeping["p:b:1"]
    assert told.core.prefill.slot_deadlock() is request(told, "k")


def test_check_finds_slots_that_should_have_been_left():
    told = begin()
    told.tell(assign("a", prompt=16))
    run(told), run(told)
    request(told, "a").flow.exported += 1
    with pytest.raises(Broken, match="5 slots are kept for whom nobody takes yet, 4 may be"):
        told.core.check()
    request(told, "a").flow.exported -= 1
    told.core.prefill.kv_send.keeping.clear()
    with pytest.raises(Broken, match="slots are kept for others than"):
        told.core.check()


# ---------------------------------------------------------------- whole clusters


@pytest.mark.parametrize("part", range(2))
def test_with_little_of_both_and_no_faults_nothing_is_computed_twice(part):
    for seed in range(FIRST + part, FIRST + SEEDS, 2):
        story = Cluster(seed, Faults(), Shape.tight(seed)).run()
        broker, limit = story.broker.core, 5.0
        assert broker.counters["restarts"] == 0 and story.now < limit, f"seed {seed}: {story.now} s"


def test_with_little_of_both_and_faults_everything_ends():
    for seed in range(FIRST, FIRST + SEEDS // 2):
        Cluster(seed, Faults.some(seed), Shape.tight(seed)).run()
