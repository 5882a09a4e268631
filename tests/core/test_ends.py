"""The end of a request: who says it, who dies around it, and what the broker tells workers of it, from which they
learn how long outputs are."""

from functools import partial
from itertools import count
from random import Random

import pytest

from tests.core.build import WordingTold, failed, heartbeat, only, ready, sent, staged, tokens
from tests.core.cluster import Cluster
from tests.core.nodes import TOKEN_BYTES, VOCABULARY
from tests.core.shapes import Faults, Shape
from tetri.core.actions import FromClient, Reply, Submitted
from tetri.core.broker.broker import Broker
from tetri.core.broker.delivery import Limits
from tetri.engine.emulated import reference
from tetri.policy.rules import Rules
from tetri.request import PredictorStatus, Receipt, Sampling, Stage
from tetri.wire.clients import Cancel, Done
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.messages import Assign, Close, Heartbeat, Hold, Load, Ready

RID = "00002a-1"
LIMITS = Limits(context=40, vocabulary=100, heartbeat_s=0.1, dead_s=5.0, patience_s=10.0, max_attempts=3)


def close(outputs=0, reason="", attempt=1):
    return Close(rid=RID, attempt=attempt, outputs=outputs, reason=reason)


def begin(deadline_s=None, **sampling):
    """It decodes on d1 after its prefill on p1, and has its first token."""
    told = WordingTold(Broker(LIMITS, Rules(prefill_route="round_robin"), epoch=42, rng=Random(1), now=0.0))
    for iid, role in (("p1", "prefill"), ("p2", "prefill"), ("d1", "decode"), ("d2", "decode")):
        told.tell(ready(iid, role), PeerUp(iid))
    told.tell(Submitted(b"c", "k", (1, 2, 3), Sampling(**{"max_tokens": 4, **sampling}), deadline_s))
    told.tell(staged("p1", RID, Stage.PREFILL), tokens("p1", RID, 0, 7), staged("d1", RID, Stage.DECODE))
    return told


def closes(actions):
    """To which instance what is said."""
    return [(action.peer, action.message) for action in actions if sent([action], kind=Close)]


@pytest.mark.parametrize(
    ("sampling", "news", "said"),
    [
        ({}, [tokens("d1", RID, 1, 8, reason="stop")], (2, "stop")),
        ({}, [tokens("d1", RID, 1, 8, 9, 10, reason="length")], (4, "length")),
        ({"ignore_eos": True}, [tokens("d1", RID, 1, 8, 9, 10, reason="length")], (0, "length")),
        ({}, [FromClient(b"c", Cancel(rid=RID))], (0, "cancelled")),
        ({}, [failed("d1", RID, retry=False)], (0, "error")),
    ],
)
def test_both_workers_hear_how_it_ended_and_what_can_be_learnt_from_that(sampling, news, said):
    told = begin(**sampling)
    assert closes(told.tell(*news)) == [("p1", close(*said)), ("d1", close(*said))]


def test_a_stop_text_ends_it_where_it_was_found():
    told = begin()
    told.stops[RID] = 2
    assert closes(told.tell(tokens("d1", RID, 1, 8, 9))) == [("p1", close(2, "stop")), ("d1", close(2, "stop"))]


def test_nothing_is_learnt_from_a_deadline():
    told = begin(deadline_s=1.0)
    assert closes(told.later(1.1)) == [("p1", close(reason="deadline")), ("d1", close(reason="deadline"))]


def test_after_the_hand_over_and_after_a_restart_it_goes_on():
    """Whoever has predicted it keeps that until the end."""
    told = begin()
    assert closes(told.tell(heartbeat("p1", Hold(RID, 1, Stage.MOVING, 1)))) == [("p1", close())]
    again = told.tell(failed("d1", RID, retry=True))
    assert closes(again) == [("p1", close()), ("d1", close())]
    prefill = told.core.table.rows[RID].prefill
    ended = told.tell(tokens(prefill, RID, 1, 8, attempt=2, reason="stop"))
    assert closes(ended) == [(prefill, close(2, "stop", attempt=2))]


def test_all_output_counts_whoever_wrote_it():
    told = begin()
    told.tell(PeerDown("d1"))
    prefill = told.core.table.rows[RID].prefill
    told.tell(tokens(prefill, RID, 1, 8, attempt=2), staged("d2", RID, Stage.DECODE, 2))
    said = told.tell(tokens("d2", RID, 2, 9, attempt=2, reason="stop"))
    assert closes(said) == [(prefill, close(3, "stop", attempt=2)), ("d2", close(3, "stop", attempt=2))]


def test_the_status_has_what_a_beat_said_of_the_predictor():
    told = begin()
    status = PredictorStatus(kind="hidden", on=True, predicted=5, late=1)
    load = Load(free_blocks=1)
    told.tell(Heartbeat(iid="p1", incarnation=1, role="prefill", load=load, holds=[], predictor=status))
    found = {each.iid: each.predictor for each in told.core.status(0.0).instances}
    assert found == {"d1": None, "d2": None, "p1": status, "p2": None}


# ---------------------------------------------------------------- who dies around it


NEWS = (  # all that is said of a request of three tokens, in order
    staged("p1", RID, Stage.PREFILL),
    tokens("p1", RID, 0, 7),
    staged("d1", RID, Stage.WAITING),
    staged("d1", RID, Stage.DECODE),
    tokens("d1", RID, 1, 8),
    tokens("d1", RID, 2, 9, reason="length"),
)


@pytest.mark.parametrize("heard", range(len(NEWS) + 1))
def test_an_instance_that_is_lost_between_any_two_messages_leaves_no_end_without_a_receipt(heard):
    """With the last message the request is over, its receipt included. Before, it begins anew where it was: nothing
    that came makes an end."""
    told = WordingTold(Broker(LIMITS, Rules(prefill_route="round_robin"), epoch=42, rng=Random(1), now=0.0))
    for iid, role in (("p1", "prefill"), ("p2", "prefill"), ("d1", "decode")):
        told.tell(ready(iid, role), PeerUp(iid))
    told.tell(Submitted(b"c", "k", (1, 2, 3), Sampling(max_tokens=3)))
    said = told.tell(*NEWS[:heard])
    lost = told.tell(PeerDown("p1" if heard < 3 else "d1"))
    ends = [reply.message for reply in only(said + lost, Reply) if isinstance(reply.message, Done)]
    again = [(assign.attempt, assign.output) for assign in sent(lost, kind=Assign)]
    if heard == len(NEWS):
        receipt = Receipt(prompt_tokens=3, adopted=3, prefill_instance="p1", decode_instance="d1")
        assert [(end.reason, end.receipt) for end in ends] == [("length", receipt)] and not again
    else:
        output = [token for news in NEWS[:heard] if hasattr(news, "items") for token in news.items[0].ids]
        assert not ends and again == [(2, output)]


def ends_by_itself():
    """A prompt after which the model says the end of sequence as its fourth token."""
    sampling = Sampling(max_tokens=9)
    for number in count():
        prompt = (number, 1, 2, 3, 4, 5, 6, 7, 8)
        if len(reference(prompt, sampling, VOCABULARY, TOKEN_BYTES)) == 4:
            return prompt, sampling


PROMPT = tuple(range(1, 15))
REQUESTS = {
    "length": (PROMPT, Sampling(max_tokens=4, ignore_eos=True)),
    "stop": ends_by_itself(),
    "first token": (PROMPT, Sampling(max_tokens=1)),
}
SHAPES = {
    "two": Shape(prefills=1, decodes=1, requests=1),
    "two, three tokens a message": Shape(prefills=1, decodes=1, requests=1, stream_interval=3),
    "one that does both": Shape(prefills=0, decodes=0, mixed=1, requests=1),
}


class Story:
    """One request in a cluster in which all goes well until the message number `at` that a worker sends, beats and
    registrations not counted. What then happens to the message and to its sender, `fault` says."""

    def __init__(self, shape, request, at=None, fault=""):
        self.world = Cluster(1, Faults(until=0.0), shape)
        (self.client,) = self.world.clients.values()
        self.client.prompt, self.client.sampling = request
        self.client.deadline_s = None
        self.at, self.fault, self.sent, self.mute = at, fault, 0, None
        for worker in self.world.workers:
            worker.send = partial(self.send, worker, worker.send)

    def send(self, worker, deliver, peer, message):
        if worker is self.mute:
            return  # its loop has still to carry out what the core said: nothing of that leaves
        now = self.sent == self.at and not isinstance(message, Heartbeat | Ready)
        self.sent += not isinstance(message, Heartbeat | Ready)
        if not (now and self.fault in ("lost", "lost with its sender")):
            deliver(peer, message)
        if now and self.fault != "lost":
            self.mute = worker
            self.world.after(0.0, partial(self.dies, worker))

    def dies(self, worker):
        self.mute = None
        worker.kill()
        self.world.after(0.1, partial(self.world.restart, worker))

    def run(self):
        """The Done. The tokens, and that the receipt is a worker's, are checked."""
        self.world.run()
        return self.client.done


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_whatever_message_is_the_last_of_its_sender_the_receipt_is_true(shape, request_):
    plain = Story(SHAPES[shape], REQUESTS[request_])
    assert plain.run().receipt.attempts == 1 and plain.sent >= 2
    attempts = {}
    for fault in ("lost", "lost with its sender", "the last of its sender"):
        stories = (Story(SHAPES[shape], REQUESTS[request_], at, fault) for at in range(plain.sent))
        attempts[fault] = [story.run().receipt.attempts for story in stories]
    assert set(attempts["lost"]) == {1}  # all of it is said again
    assert attempts["the last of its sender"][-1] == 1 < attempts["lost with its sender"][-1]  # the end itself
