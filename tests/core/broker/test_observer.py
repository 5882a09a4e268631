"""What onlookers are told, through the core."""

import pytest

from tests.core.broker.serving import RID, replies, serving, submit
from tests.core.broker.test_choices import begin, item
from tests.core.broker.test_suspects import lone
from tests.core.build import ending, failed, heartbeat, ready, staged, tokens
from tetri.core.actions import FromClient
from tetri.cost import Cost
from tetri.policy.rules import Rules
from tetri.request import Stage
from tetri.wire.clients import ChangeRole, Observe
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.messages import Failed, FlipWanted, Staged
from tetri.wire.observation import Ended, Move

EPOCH = 42  # of `serving`


def observe(told, since=0, epoch=EPOCH):
    (found,) = replies(told.tell(FromClient(b"onlooker", Observe(epoch=epoch, since=since))), b"onlooker")
    return found


def counts(told, name):
    return {label: count for label, count in observe(told).measures.counts[name].items() if count}


def measured(told):
    """Number and sum of the values of each histogram that has any."""
    found = observe(told).measures.histograms
    return {name: (sum(each.counts), pytest.approx(each.total)) for name, each in found.items() if any(each.counts)}


def at(told, now, *events):
    told.now = now
    return told.tell(*events)


@pytest.fixture
def served():
    """Two requests: one gets tokens at 2, 4, 5 and 5, the other none. Both have ended."""
    told = serving("p1", "d1", limits={"dead_s": 60.0})
    told.tell(submit())
    at(told, 1.0, staged("p1", RID, Stage.PREFILL))
    at(told, 2.0, tokens("p1", RID, 0, 7), staged("d1", RID, Stage.DECODE))
    at(told, 4.0, tokens("d1", RID, 1, 8))
    at(told, 5.0, *ending("d1", RID, 2, 9, 10))
    at(told, 6.0, submit("k2", prompt=(1,), deadline_s=1.0))
    told.later(1.5)
    return told


# ---------------------------------------------------------------- measures


def test_the_time_to_the_first_token_is_measured_when_that_comes():
    told = serving("p1", "d1", limits={"dead_s": 60.0})
    told.tell(submit())
    at(told, 1.0, staged("p1", RID, Stage.PREFILL))
    assert "ttft" not in measured(told)
    at(told, 2.0, tokens("p1", RID, 0, 7))
    assert measured(told)["ttft"] == (1, 2.0)


def test_each_choice_is_measured(served):
    assert measured(served) == {
        "ttft": (1, 2.0),
        "itl": (3, 3.0),
        "tpot": (1, 1.0),
        "jct": (2, 5.0 + 1.5),
        "stage_queued": (2, 1.0 + 1.5),
        "stage_prefill": (1, 1.0),
        "stage_moving": (1, 0.0),
        "stage_decode": (1, 3.0),
        "queue_predicted": (2, 0.0),
        "prompt_tokens": (2, 4.0),
        "output_tokens": (2, 4.0),
    }
    assert counts(served, "requests_ended") == {"length": 1, "deadline": 1}
    assert counts(served, "tokens") == {"prompt": 4, "output": 4, "adopted": 3}


def test_tokens_that_come_again_are_no_new_ones():
    told = serving("p1", "d1")
    told.tell(submit(), tokens("p1", RID, 0, 7), staged("d1", RID, Stage.DECODE))
    at(told, 1.0, tokens("d1", RID, 1, 8))
    at(told, 3.0, tokens("d1", RID, 0, 7, 8), tokens("d1", RID, 1, 8, 9))
    assert measured(told)["itl"] == (2, 3.0)


def test_the_tokens_of_a_step_are_counted_whenever_their_choices_got_the_last_ones():
    told = begin(item("p1", (RID, 0, [1]), (f"{RID}.1", 0, [2])), n=3)
    at(told, 1.0, item("p1", (f"{RID}.2", 0, [3])))
    told.tell(*(staged("d1", rid, Stage.DECODE) for rid in (RID, f"{RID}.1", f"{RID}.2")))
    at(told, 3.0, item("d1", (RID, 1, [1]), (f"{RID}.2", 1, [1]), (f"{RID}.1", 1, [1])))
    assert measured(told)["itl"] == (3, 3.0 + 2.0 + 3.0)


def test_the_queue_before_a_request_is_predicted_when_it_is_placed():
    seconds = Cost(prefill=((1, 1.0), (64, 1.0)))
    told = serving("p1", "d1", cost=seconds, chunk_tokens=64)
    for key in "abc":
        told.tell(submit(key))
    each = seconds.prompt_s(3, 0, 64)
    assert each > 0 and measured(told)["queue_predicted"] == (3, 3 * each)  # 0, 1 and 2 requests before it


REFUSALS = [
    ("invalid", submit(prompt=()), {}),
    ("invalid", submit(top_p=2.0), {}),
    ("invalid", submit(prompt=[100]), {}),
    ("invalid", submit(min_tokens=9), {}),
    ("too_long", submit(prompt=[1] * 40), {}),
    ("too_long", submit(prompt=[1] * 30, max_tokens=11), {}),
    ("too_long", submit(prompt=[1] * 30, max_tokens=99), {"context": 1 << 20}),
    ("too_long", submit(), {"max_mib": 0}),
    ("too_many_choices", submit(n=9), {}),
    ("full", submit(), {"max_open": 0}),
]


@pytest.mark.parametrize(("reason", "event", "limits"), REFUSALS)
def test_a_refusal_is_counted_by_its_reason(reason, event, limits):
    told = serving("p1", "d1", limits=limits)
    told.tell(event)
    assert counts(told, "requests_refused") == {reason: 1}


def test_anothers_key_is_a_reason_too(served):
    served.tell(submit("k2", secret="a" * 32), submit("k3", prompt=(2,)), submit("k3", prompt=(3,)))
    assert counts(served, "requests_refused") == {"repeated_key": 2}


def lost(kind, **fields):
    return kind(iid="p1", incarnation=1, rid=RID, attempt=1, lost="d1", **fields)


RETRIES = [
    ("worker_lost", PeerDown("p1")),
    ("worker_restarted", ready("p1", "prefill", 2)),
    ("not_held", heartbeat("p1", read=99)),
    ("kv_lost", lost(Failed, why="oh no", retry=True)),
    ("kv_unread", failed("p1", RID, retry=True, avoid=["p1"])),
    ("given_up", failed("p1", RID, retry=True)),
]


@pytest.mark.parametrize(("reason", "event"), RETRIES)
def test_a_retry_is_counted_by_its_reason(reason, event):
    told = serving("p1", "p2", "d1", rules=Rules(prefill_route="round_robin"))
    told.tell(submit(), tokens("p1", RID, 0, 7))
    told.tell(event)
    assert counts(told, "retries") == {reason: 1}
    assert told.core.counters["restarts"] == 1


def test_a_suspect_whose_kv_was_lost_on_its_way_is_retried_for_that():
    told = serving("p1", "p2", "d1", "d2")
    told.tell(submit(), PeerDown("p1"), tokens("p2", RID, 0, 7, attempt=2))
    told.tell(Staged(iid="p2", incarnation=1, rid=RID, attempt=2, stage=Stage.MOVING, lost="d1"))
    assert counts(told, "retries") == {"worker_lost": 1, "kv_lost": 1}


# ---------------------------------------------------------------- instances


def events(told, since=0):
    return [(event.kind, event.iid, event.note) for event in observe(told, since).events]


def test_instances_that_join_are_lost_and_come_back_are_events():
    told = serving("p1", "d1")
    told.tell(PeerDown("p1"), PeerUp("p1"), heartbeat("p1", role="prefill"))
    told.tell(PeerDown("p1"), ready("p1", "prefill"))
    told.tell(PeerDown("d1"), ready("d1", "decode", 2), ready("p1", "prefill", 3))
    assert events(told) == [
        ("joined", "p1", "prefill"),
        ("joined", "d1", "decode"),
        ("lost", "p1", "connection lost"),
        ("back", "p1", "prefill, the same process"),
        ("lost", "p1", "connection lost"),
        ("back", "p1", "prefill, the same process"),
        ("lost", "d1", "connection lost"),
        ("joined", "d1", "decode, restarted"),
        ("joined", "p1", "prefill, restarted"),
    ]


def test_a_change_of_role_is_an_event_and_counted_once_it_is_carried_out():
    told = serving("p1", "p2", "d1")
    since = observe(told).serial
    told.tell(FromClient(b"operator", ChangeRole(key="c", iid="p1", role="decode")))
    assert events(told, since) == [] and counts(told, "role_changes") == {}
    number = told.core.flips.changes["p1"].number
    at(told, 0.25, heartbeat("p1", role="decode", flip=number))
    told.tell(FromClient(b"operator", ChangeRole(key="d", iid="p1", role="decode")))  # as it is
    told.tell(heartbeat("p1", role="decode", flip=number + 1))
    told.tell(FlipWanted(iid="p1", role="mixed", why="load"), heartbeat("p1", role="mixed", flip=number + 2))
    assert events(told, since) == [
        ("role", "p1", "prefill > decode in 0.25 s"),
        ("role", "p1", "decode > mixed in 0.00 s"),
    ]
    assert counts(told, "role_changes") == {"prefill>decode": 1, "decode>mixed": 1}


def test_a_role_that_an_earlier_broker_gave_is_an_event():
    told = serving("p1", "d1")
    told.tell(heartbeat("p1", role="mixed"))
    assert events(told)[-1] == ("role", "p1", "prefill > mixed, as it reports")


def test_kv_that_cannot_be_read_is_an_event_until_it_can_be():
    told = serving("p1", "d1")
    told.tell(submit(), submit("k2"), tokens("p1", RID, 0, 7))
    since = observe(told).serial
    told.tell(failed("p1", RID, retry=True, avoid=["p1"]), failed("p1", RID, retry=True, attempt=2, avoid=["p1"]))
    assert events(told, since) == [("failing", "p1", "oh no")]
    since = observe(told).serial
    told.tell(staged("d1", "r2", Stage.WAITING))
    assert events(told, since) == [("healed", "p1", "d1 has read its KV")]


# ---------------------------------------------------------------- moves and ends


def test_moves_say_who_holds_a_choice(served):
    moves = [(move.stage, move.iid, move.age_s, move.outputs) for move in observe(served).moves if move.rid == RID]
    assert moves == [
        (Stage.QUEUED, "", 7.5, 0),
        (Stage.QUEUED, "p1", 7.5, 0),
        (Stage.PREFILL, "p1", 6.5, 0),
        (Stage.MOVING, "p1", 5.5, 1),
        (Stage.DECODE, "d1", 5.5, 1),
        (Stage.DONE, "", 2.5, 4),
    ]


def test_an_end_has_what_its_done_says(served):
    assert observe(served).ended[0] == Ended(
        rid=RID,
        reason="length",
        age_s=2.5,
        ttft_s=2.0,
        tpot_s=1.0,
        jct_s=5.0,
        prompt_tokens=3,
        outputs=4,
        attempts=1,
        prefill="p1",
        decode="d1",
        slo_result="met",
    )
    last = observe(served).ended[1]
    assert (last.reason, last.ttft_s, last.tpot_s, last.prefill, last.decode) == ("deadline", None, None, "p1", "")


def test_what_was_told_is_not_told_again_but_after_a_restart_of_the_broker(served):
    first = observe(served)
    assert first.epoch == EPOCH and first.missed == 0 and first.status == served.status()
    again = observe(served, first.serial)
    assert (again.moves, again.ended, again.events, again.serial) == ([], [], [], first.serial)
    served.tell(submit("k3"))
    assert observe(served, first.serial).moves == [
        Move("r3", Stage.QUEUED, "", 0.0, 1, 0),
        Move("r3", Stage.QUEUED, "p1", 0.0, 1, 0),
    ]
    other = observe(served, first.serial, epoch=7)
    assert len(other.moves) == len(first.moves) + 2 and other.ended == first.ended and other.missed == 0


def test_a_choice_that_kills_its_workers_is_an_event():
    told = serving("p1", "p2", "p3", "d1")
    told.tell(submit())
    for number in (1, 2, 3):
        iid = told.core.table.choices[RID].prefill
        if number == 3:
            told.tell(lone(iid))
        told.tell(PeerDown(iid))
    told.later(1.5)
    killed = observe(told).events[-1]
    assert (killed.kind, killed.iid) == ("killed", iid)
    assert killed.note.startswith(f"{RID}: it kills workers")
