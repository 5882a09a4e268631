"""What the broker tells workers of the end of a request, from which they learn how long outputs are."""

from random import Random

import pytest

from tests.core.build import WordingTold, beat, failed, finished, ready, sent, staged, tokens
from tetri.core.actions import FromClient, Submitted
from tetri.core.broker import Broker
from tetri.core.desk import Limits
from tetri.policy.rules import Rules
from tetri.request import PredictorStatus, Sampling, Stage
from tetri.wire.clients import Cancel
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.messages import Beat, Close, Hold, Load

RID = "00002a-1"
LIMITS = Limits(context=40, vocabulary=100, beat_s=0.1, dead_s=5.0, patience_s=10.0, max_attempts=3)


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
        ({}, [tokens("d1", RID, 1, 8, reason="stop"), finished("d1", RID, 2, "stop")], (2, "stop")),
        ({}, [finished("d1", RID, 2, "stop"), tokens("d1", RID, 1, 8, reason="stop")], (2, "stop")),
        ({}, [tokens("d1", RID, 1, 8, 9, 10), finished("d1", RID, 4, "length")], (4, "length")),
        ({"ignore_eos": True}, [tokens("d1", RID, 1, 8, 9, 10), finished("d1", RID, 4, "length")], (0, "length")),
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
    assert closes(told.tell(beat("p1", Hold(RID, 1, Stage.MOVING, 1)))) == [("p1", close())]
    again = told.tell(failed("d1", RID, retry=True))
    assert closes(again) == [("p1", close()), ("d1", close())]
    prefill = told.core.table.rows[RID].prefill
    told.tell(tokens(prefill, RID, 1, 8, attempt=2, reason="stop"))
    ended = told.tell(finished(prefill, RID, 2, "stop", attempt=2))
    assert closes(ended) == [(prefill, close(2, "stop", attempt=2))]


def test_all_output_counts_whoever_wrote_it():
    told = begin()
    told.tell(PeerDown("d1"))
    prefill = told.core.table.rows[RID].prefill
    told.tell(tokens(prefill, RID, 1, 8, attempt=2), staged("d2", RID, Stage.DECODE, 2))
    said = told.tell(tokens("d2", RID, 2, 9, attempt=2, reason="stop"), finished("d2", RID, 3, "stop", attempt=2))
    assert closes(said) == [(prefill, close(3, "stop", attempt=2)), ("d2", close(3, "stop", attempt=2))]


def test_one_whose_last_tokens_came_before_its_worker_was_lost_ends_as_it_said():
    told = begin()
    told.tell(tokens("d1", RID, 1, 8, reason="stop"))
    assert ("p1", close(2, "stop")) in closes(told.tell(PeerDown("d1")))


def test_the_status_has_what_a_beat_said_of_the_predictor():
    told = begin()
    status = PredictorStatus(kind="hidden", on=True, predicted=5, late=1)
    load = Load(free_blocks=1)
    told.tell(Beat(iid="p1", incarnation=1, role="prefill", load=load, holds=[], predictor=status))
    found = {each.iid: each.predictor for each in told.core.status(0.0).instances}
    assert found == {"d1": None, "d2": None, "p1": status, "p2": None}
