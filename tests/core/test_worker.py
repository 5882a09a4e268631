"""The worker's core as a whole: registering, views, beats, when it steps and when it rests."""

from random import Random

import pytest

from tests.core.build import (
    Told,
    assign,
    grant,
    identity,
    instance,
    kinds,
    landed,
    membership,
    offer,
    ready,
    refuse,
    sent,
    view,
)
from tetri.core.actions import BROKER, Broken, RequestRejected, Step
from tetri.core.worker.worker import Worker
from tetri.engine_request import Sampled, Span, StepDone
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.handover import Drop, Offer
from tetri.wire.messages import Close, Failed, Heartbeat, Ready, Resend

NOTHING = StepDone()


@pytest.fixture
def worker():
    told = Told(Worker(identity("p1", "prefill"), Random(1), now=0.0))
    yield told
    if not told.core.stepping:
        told.core.check()


def see_p2(told, number=1):
    """Another instance, whose offers can be taken."""
    told.tell(membership(number, instance("p2", "prefill")))


# ---------------------------------------------------------------- registering


def test_it_registers_when_the_broker_is_there(worker):
    (sent_ready,) = sent(worker.tell(PeerUp(BROKER)), BROKER)
    assert isinstance(sent_ready, Ready) and (sent_ready.instance.role, sent_ready.load.free_blocks) == ("prefill", 10)
    assert not worker.tell(PeerDown(BROKER))


def test_it_registers_again_when_it_hears_no_view(worker):
    worker.tell(PeerUp(BROKER))
    worker.later()
    assert not sent(worker.later(1.9), kind=Ready)
    assert sent(worker.later(0.2), kind=Ready)


def test_it_registers_at_once_when_a_view_leaves_it_out(worker):
    worker.tell(membership(1, instance("p1", "prefill", incarnation=9)))
    assert sent(worker.later(), kind=Ready)
    worker.tell(membership(2, instance("p1", "prefill")))
    assert not sent(worker.later(0.1), kind=Ready)


def test_views_connect_and_disconnect(worker):
    assert kinds(worker.tell(membership(1, instance("p1", "prefill"), instance("d1", "decode")))) == ["Connect"]
    assert not worker.tell(membership(1), membership(0))  # older ones
    assert kinds(worker.tell(membership(2, instance("d1", "decode", incarnation=2)))) == ["Disconnect", "Connect"]
    assert kinds(worker.tell(membership(1, epoch=2))) == ["Disconnect"]


# ---------------------------------------------------------------- beats and rest


def test_beats_come_regularly_and_list_what_is_held(worker):
    worker.tell(assign("r", prompt=12))
    (first,) = sent(worker.later(), kind=Heartbeat)
    assert [(hold.rid, hold.stage) for hold in first.holds] == [("r", "queued")]
    worker.tell(StepDone(spans=(Span("p:r:1", 0, 8),), held=(("p:r:1", 3),)))
    (second,) = sent(worker.later(0.1), kind=Heartbeat)
    assert [hold.stage for hold in second.holds] == ["prefill"]
    assert (second.load.free_blocks, second.load.queued, second.load.queued_tokens) == (7, 1, 4)
    assert (first.slots_used, second.slots_used) == (0, 2)


def test_it_rests_when_there_is_nothing_to_do_and_wakes_with_any_event(worker):
    worker.later()
    assert worker.core.idle and worker.core.deadline() == pytest.approx(0.1)
    worker.tell(membership(1))
    assert worker.core.deadline() == float("-inf")
    worker.later()
    assert worker.core.idle


def test_it_does_nothing_but_wait_while_the_engine_computes(worker):
    worker.tell(assign("r", prompt=8))
    assert kinds(worker.later())[-1] == "Step"
    assert worker.core.deadline() is None
    assert not any(isinstance(action, Step) for action in worker.later(0.2))


def test_it_rests_when_a_step_achieved_nothing(worker):
    see_p2(worker)
    worker.tell(offer("r", prompt=8, src="p2"))
    assert kinds(worker.later())[-1] == "Step"
    worker.tell(NOTHING)
    assert worker.core.idle
    see_p2(worker, 2)
    assert kinds(worker.later()) == ["Ready > broker", "Step"]
    worker.tell(StepDone(allocated=("d:r:1:p2:1",), held=(("d:r:1:p2:1", 2),)))
    assert not worker.core.idle


# ---------------------------------------------------------------- what goes where


def test_both_halves_share_one_engine_and_one_ledger(worker):
    see_p2(worker)
    worker.tell(assign("a", prompt=8), offer("b", prompt=8, src="p2"))
    worker.later()
    both = (("p:a:1", 2), ("d:b:1:p2:1", 2))
    assert worker.core.ledger.free == 6
    done = StepDone((Span("p:a:1", 0, 8),), (Sampled("p:a:1", (5,), None),), ("d:b:1:p2:1",), (), both)
    worker.tell(done)
    assert worker.core.ledger.free == 8
    worker.tell(Close(rid="a", attempt=1), Close(rid="b", attempt=1), Close(rid="c", attempt=1))
    assert worker.core.ledger.free == 10


def test_a_step_that_ran_something_else_must_not_go_on(worker):
    worker.tell(assign("r", prompt=8))
    worker.later()
    with pytest.raises(Broken, match="planned"):
        worker.core.handle(StepDone(spans=(Span("p:r:1", 0, 4),), held=(("p:r:1", 2),)), 0.0)


def test_an_engine_that_holds_more_than_it_should_must_not_go_on(worker):
    worker.tell(assign("r", prompt=8))
    worker.later()
    with pytest.raises(Broken, match="the engine holds 3 blocks"):
        worker.core.handle(StepDone(spans=(Span("p:r:1", 0, 8),), held=(("p:r:1", 3),)), 0.0)


def test_resending_what_is_unknown_says_nothing(worker):
    assert not worker.tell(Resend(rid="r", attempt=1, start=0))


def test_a_rejected_leg_is_told_of_by_its_half(worker):
    see_p2(worker)
    worker.tell(offer("b", prompt=8, src="p2"))
    assert kinds(worker.tell(RequestRejected("d:b:1:p2:1", "no"))) == ["Refuse > p2"]
    worker.tell(assign("a", prompt=8))
    worker.later()
    assert isinstance(sent(worker.tell(RequestRejected("p:a:1", "no")), BROKER)[0], Failed)
    worker.tell(NOTHING)


def test_nonsense_is_refused(worker):
    with pytest.raises(Broken, match="a worker knows no"):
        worker.core.handle(ready("p1", "prefill"), 0.0)


def test_check_finds_an_account_without_a_leg(worker):
    worker.core.ledger.allocate("lost", 1)
    with pytest.raises(Broken, match="1 accounts for 0 legs"):
        worker.core.check()
    worker.core.ledger.close("lost")


def test_a_grant_for_an_offer_that_was_taken_back_is_given_back(worker):
    (message,) = sent(worker.tell(grant("r", number=3, src="d1")), "d1")
    assert isinstance(message, Drop) and (message.rid, message.offer) == ("r", 3)
    assert not worker.tell(landed("r", 0), refuse("r"))


def test_without_a_monitor_whoever_refused_is_asked_again_by_the_own_clock():
    """As when an offer has come before the roster that tells of its sender."""
    told = Told(Worker(identity("p1", "prefill", load_s=0.1, heartbeat_s=1e6), Random(1), now=0.0))
    told.later()
    told.tell(membership(1, instance("p1", "prefill"), instance("d1", "decode")), PeerUp("d1"), assign("r", prompt=8))
    assert sent(told.later(), "d1", Offer)
    told.tell(StepDone((Span("p:r:1", 0, 8),), (Sampled("p:r:1", (5,), None),)), refuse("r"))
    assert not sent(told.later(0.09), "d1", Offer)
    (again,) = sent(told.later(0.2), "d1", Offer)
    assert again.offer == 2
    told.tell(refuse("r", number=2), view(1, d1=9))
    assert not sent(told.later(0.2), "d1", Offer)  # with views, not before the next one
