"""Closes: one for each that a worker must let go of, and another only when the first was lost."""

import pytest

from tests.core.broker.serving import RID, cancel, serving, submit
from tests.core.build import close, heartbeat, ready, staged, tokens
from tests.core.reading import sent
from tetri.request import Stage
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.messages import Close, Hold, Membership


def hold(rid=RID, attempt=1, stage=Stage.QUEUED):
    return Hold(rid, attempt, stage, 0)


def closes(actions):
    return sent(actions, kind=Close)


@pytest.fixture
def served():
    told = serving("p1", "d1")
    told.later(1.0)  # what they start with is sent
    return told


def again(served):
    """The next Membership, which tells what was read."""
    return served.later(1.0) and served.core.members.serial


def test_a_close_is_sent_once_while_it_lies_unread(served):
    served.tell(submit())
    assert closes(served.tell(cancel())) == [close(RID, 1, "cancelled")]
    before = served.core.members.serial
    for _ in range(9):
        served.now += 10.0
        assert served.tell(heartbeat("p1", hold(), read=before)) == []
    after = again(served)
    assert closes(served.tell(heartbeat("p1", hold(), read=after))) == [close(RID)]
    assert served.tell(heartbeat("p1", hold(), read=after)) == []
    assert closes(served.tell(heartbeat("p1", hold(), read=again(served)))) == [close(RID)]
    assert served.tell(heartbeat("p1", read=again(served))) == []


def test_what_the_broker_never_knew_is_closed_at_once_and_once(served):
    assert closes(served.tell(heartbeat("p1", hold("x"), hold("y", 3)))) == [close("x"), close("y", 3)]
    assert served.tell(heartbeat("p1", hold("x"), hold("y", 3))) == []
    assert closes(served.tell(heartbeat("p1", hold("x", 2), hold("y", 2)))) == [close("x", 2)]  # y: closed up to 3


def test_a_prefill_instance_lets_go_once_when_all_has_landed(served):
    served.tell(submit(), tokens("p1", RID, 0, 7))
    assert closes(served.tell(staged("d1", RID, Stage.WAITING))) == [close(RID)]
    assert served.tell(heartbeat("p1", hold(stage=Stage.MOVING), read=served.core.members.serial)) == []
    after = again(served)
    assert closes(served.tell(heartbeat("p1", hold(stage=Stage.MOVING), read=after))) == [close(RID)]


@pytest.mark.parametrize("lost", [[PeerDown("p1"), PeerUp("p1")], [ready("p1", "prefill", 2)]], ids=["link", "process"])
def test_with_its_worker_a_close_is_lost(served, lost):
    served.tell(submit(), cancel(), *lost)
    incarnation = 2 if len(lost) == 1 else 1
    assert closes(served.tell(heartbeat("p1", hold(), incarnation=incarnation))) == [close(RID)]


def test_thousands_of_cancelled_requests_are_closed_once_each(served):
    """Their worker reads the Closes bit by bit, and goes on listing the others."""
    actions, held, unread, read, count = [], {}, [], 0, 0
    for number in range(500):
        served.tell(submit(f"k{number}"))
        held[f"r{number + 1}"] = hold(f"r{number + 1}")
    for rid in held:
        actions += served.tell(cancel(rid))
    while held:
        unread += sent(actions, "p1")
        for message in unread[:50]:
            count += isinstance(message, Close)
            read = message.serial if isinstance(message, Membership) else read
            held.pop(getattr(message, "rid", ""), None)
        del unread[:50]
        actions = [*served.later(0.5), *served.tell(heartbeat("p1", *held.values(), read=read))]
    assert count == 500
