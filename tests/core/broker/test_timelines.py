"""Timelines, through the core."""

import gc
import tracemalloc

import pytest
from msgspec.structs import replace

from tests.core.broker.serving import RID, cancel, replies, serving, submit
from tests.core.broker.test_choices import begin, item
from tests.core.build import capacity, ending, failed, heartbeat, staged, tokens
from tetri.core.actions import Detokenized, FromClient
from tetri.core.broker import timelines
from tetri.core.broker.requests import MOST_EVENTS, MOST_STEPS
from tetri.request import Stage
from tetri.wire.clients import EndRequest, Explain, Observe, Refused
from tetri.wire.events import PeerDown
from tetri.wire.observation import EngineStep, StageSpan, StepSpan, TraceEvent

GRACE_S = 2.0  # of `serving`


def explain(told, rid=RID, choice=0):
    """The timeline of a choice, or why there is none."""
    (found,) = replies(told.tell(FromClient(b"onlooker", Explain(rid=rid, choice=choice))), b"onlooker")
    return found.reason if isinstance(found, Refused) else found


def at(told, now, *events):
    told.now = now
    return told.tell(*events)


def stepped(event, *step):
    return event.changed(step=EngineStep(*step))


def traced(iid, *events, at=0.0):
    return heartbeat(iid, at=at, traced=[TraceEvent(*event) for event in events]).changed(holds=None)


def kinds(timeline):
    return [(event.kind, event.iid, round(event.at, 3)) for event in timeline.events]


@pytest.fixture
def served():
    """One request: arrived at 0, prefilled by p1 from 1 to 2, at d1 from 3 on, decoded from 4 on, ended at 6."""
    told = serving("p1", "d1", limits={"dead_s": 60.0})
    told.tell(submit())
    at(told, 1.0, staged("p1", RID, Stage.PREFILL))
    at(told, 2.0, stepped(tokens("p1", RID, 0, 7), 12.0, 0.5, 0, 3))
    at(told, 3.0, staged("d1", RID, Stage.WAITING))
    at(told, 4.0, staged("d1", RID, Stage.DECODE))
    at(told, 5.0, stepped(tokens("d1", RID, 1, 8, 9), 105.0, 0.25, 8, 0, 2))
    at(told, 6.0, stepped(*ending("d1", RID, 3, 10), 106.0, 0.25, 4))
    return told


def test_it_has_the_stages_the_holders_and_the_steps_on_the_time_since_the_arrival(served):
    found = explain(served)
    assert found.stages == [
        StageSpan(Stage.QUEUED, 1, "p1", 0.0, 1.0),
        StageSpan(Stage.PREFILL, 1, "p1", 1.0, 1.0),
        StageSpan(Stage.MOVING, 1, "p1", 2.0, 1.0),
        StageSpan(Stage.WAITING, 1, "d1", 3.0, 1.0),
        StageSpan(Stage.DECODE, 1, "d1", 4.0, 2.0),
    ]
    assert found.steps == [
        StepSpan(1.5, 0.5, "p1", 1, 0, 3, 1),
        StepSpan(4.75, 0.25, "d1", 2, 8, 0, 2),
        StepSpan(5.75, 0.25, "d1", 1, 4, 0, 1),
    ]
    assert (found.reason, found.jct_s, found.ttft_s, found.outputs) == ("length", 6.0, 2.0, 4)
    assert found.receipt.decode_instance == "d1" and found.age_s == 6.0


def test_its_tpot_is_that_of_the_ended_request_up_to_the_last_token():
    told = serving("p1", "d1", limits={"dead_s": 60.0})
    told.tell(submit())
    at(told, 2.0, tokens("p1", RID, 0, 7))
    at(told, 2.0, staged("d1", RID, Stage.DECODE))
    at(told, 3.0, tokens("d1", RID, 1, 8, 9))
    assert explain(told).tpot_s == 0.5
    at(told, 9.0, FromClient(b"onlooker", EndRequest(rid=RID)))
    (observed,) = replies(told.tell(FromClient(b"onlooker", Observe())), b"onlooker")
    assert (explain(told).tpot_s, explain(told).jct_s) == (0.5, 9.0) and observed.ended[-1].tpot_s == 0.5


def test_it_is_the_same_once_the_request_is_forgotten(served):
    before = explain(served)
    served.later(GRACE_S + 0.1)
    assert not served.core.table.requests
    after = explain(served)
    assert after.age_s == served.now
    assert after.changed(age_s=0.0) == before.changed(age_s=0.0)


def test_of_an_open_choice_it_is_what_is_known_so_far():
    told = serving("p1", "d1")
    told.tell(submit(prompt=(1, 2)))
    at(told, 1.5, staged("p1", RID, Stage.PREFILL))
    told.now = 2.0
    found = explain(told)
    assert found.stages[-1] == StageSpan(Stage.PREFILL, 1, "p1", 1.5, 0.5)
    assert (found.reason, found.stage, found.prompt_tokens, found.outputs) == (None, Stage.PREFILL, 2, 0)


def test_what_is_not_known_is_refused_by_the_id_of_the_choice(served):
    assert explain(served, "k") == "nothing is known here of choice 0 of request k"
    (refused,) = replies(served.tell(FromClient(b"onlooker", Explain(rid=RID, choice=1))), b"onlooker")
    assert refused.key == f"{RID}.1"
    assert explain(served, RID, 1) == f"nothing is known here of choice 1 of request {RID}"


def test_a_choice_can_be_named_by_its_id():
    told = begin(n=2)
    assert explain(told, f"{RID}.1") == explain(told, RID, 1)
    assert explain(told, RID, 1).choice == 1


# ---------------------------------------------------------------- what workers trace


def test_what_workers_trace_is_told_on_the_brokers_clock_also_when_it_comes_after_the_end(served):
    """The clock of p1 is 10 s ahead, that of d1 100 s: the steps have told so."""
    at(served, 6.1, traced("p1", ("chunk", RID, 1, 11.0, "", 0.5, "", 0, 3, 3), at=16.1))
    at(served, 6.2, traced("d1", ("fetch", RID, 1, 102.5, "", 0.25, "p1", 0, 1, 32, "shm"), at=106.2))
    open_too = explain(served)
    served.later(GRACE_S)
    found = explain(served)
    assert kinds(found) == kinds(open_too) == [("chunk", "p1", 1.0), ("fetch", "d1", 2.5)]
    fetch = found.events[1]
    assert (fetch.seconds, fetch.peer, fetch.first, fetch.last, fetch.size, fetch.note) == (0.25, "p1", 0, 1, 32, "shm")


def test_a_choice_that_is_not_known_is_no_matter(served):
    served.tell(traced("p1", ("chunk", "canary-2a-1", 1, 0.0), ("chunk", "nobody", 1, 0.0)))
    assert explain(served, "canary-2a-1").startswith("nothing is known")
    assert explain(served).events == []


def test_choices_that_share_a_prefill_show_it_and_each_its_own_events():
    told = begin(n=2)
    shared = [(kind, RID, 1, 0.0) for kind in ("chunk", "offered", "granted", "deferred", "refused", "export", "fetch")]
    told.tell(traced("p1", *shared), traced("d1", ("preempted", RID, 1, 0.0), ("recompute", RID, 1, 0.0)))
    first, second = explain(told), explain(told, choice=1)
    assert [event.kind for event in second.events] == [event[0] for event in shared]
    assert [event.kind for event in first.events] == [*(event[0] for event in shared), "preempted", "recompute"]


def test_the_prefill_goes_on_under_the_name_of_another_choice_when_the_first_one_has_ended():
    told = begin(item("p1", (RID, 0, [1])), n=2)
    told.tell(*ending("p1", RID, 1, reason="stop"), traced("p1", ("export", f"{RID}.1", 1, 0.0)))
    assert [[event.kind for event in explain(told, choice=index).events] for index in (0, 1)] == [["export"]] * 2


def test_what_the_others_do_after_a_choice_has_ended_is_not_its_own():
    told = begin(item("p1", (RID, 0, [1])), n=2)
    at(told, 2.0, *ending("p1", RID, 1, reason="stop"))
    at(told, 5.0, traced("p1", ("export", f"{RID}.1", 1, 1.0), ("granted", f"{RID}.1", 1, 4.0), at=5.0))
    assert [[event.kind for event in explain(told, choice=index).events] for index in (0, 1)] == [
        ["export"],
        ["export", "granted"],
    ]


def test_choices_that_are_computed_apart_show_only_their_own():
    told = begin(item("p1", (RID, 0, [1]), (f"{RID}.1", 0, [2])), n=2)
    told.tell(PeerDown("p1"), traced("p2", ("chunk", RID, 2, 0.0)))
    assert [event.kind for event in explain(told).events] == ["retry", "chunk"]
    assert [event.kind for event in explain(told, choice=1).events] == ["retry"]


# ---------------------------------------------------------------- what the broker knows itself


def test_another_attempt_says_why_and_where_it_goes_on():
    told = serving("p1", "d1", "d2")
    told.tell(submit(), tokens("p1", RID, 0, 7), staged("d1", RID, Stage.DECODE))
    at(told, 1.0, PeerDown("d1"))
    at(told, 2.0, tokens("p1", RID, 1, 8, attempt=2), staged("d2", RID, Stage.DECODE, attempt=2))
    found = explain(told)
    assert found.events == [
        TraceEvent("retry", RID, 2, 1.0, "broker", note="d1: connection lost"),
        TraceEvent("migrated", RID, 2, 2.0, "d2", peer="d1"),
    ]
    assert found.attempts == 2
    assert [(span.attempt, span.stage) for span in found.stages][-1] == (2, Stage.DECODE)


def test_an_attempt_that_is_decoded_where_the_last_one_was_has_not_migrated():
    told = serving("p1", "d1")
    told.tell(submit(), tokens("p1", RID, 0, 7), staged("d1", RID, Stage.DECODE), failed("d1", RID, retry=True))
    told.tell(tokens("p1", RID, 1, 8, attempt=2), staged("d1", RID, Stage.DECODE, attempt=2))
    assert [event.kind for event in explain(told).events] == ["retry"]


# ---------------------------------------------------------------- bounds


def large(**limits):
    """A broker that serves long requests."""
    workers = [(iid, {"capacity": capacity(blocks=1 << 16, context=1 << 16)}) for iid in ("p1", "d1")]
    return serving(*workers, limits={"context": 1 << 16, **limits})


def test_steps_and_events_beyond_the_bounds_are_counted():
    told = large()
    told.tell(submit(max_tokens=MOST_STEPS + 3), tokens("p1", RID, 0, 7), staged("d1", RID, Stage.DECODE))
    for index in range(MOST_STEPS + 2):
        told.core.handle(stepped(tokens("d1", RID, index + 1, 8), float(index), 0.1, 1), 0.0)
    told.core.handle(traced("d1", *[("preempted", RID, 1, 0.0)] * (MOST_EVENTS + 5)), 0.0)
    found = explain(told)
    known, unknown = 2 + 5, 1  # tokens that are sent again come without their steps
    assert (len(found.steps), len(found.events), found.left_out) == (MOST_STEPS, MOST_EVENTS, known + unknown)


def run_through(told, count):
    """So many requests, one after the other, that are cancelled and forgotten. Returns their ids."""
    first = told.core.counters["accepted"]
    rids = [f"r{first + number}" for number in range(1, count + 1)]
    for rid in rids:
        told.core.handle(replace(submit(rid), rid=rid), told.now)
        told.core.handle(cancel(rid), told.now)
        told.core.handle(Detokenized(rid, 0, (), "", None, True), told.now)
        told.core.tick(told.now)
    assert not told.core.table.requests
    return rids


def test_the_timelines_of_the_last_ones_are_kept(monkeypatch):
    assert timelines.MOST_KEPT == 10_000
    monkeypatch.setattr(timelines, "MOST_KEPT", 10)
    told = serving("p1", "d1", limits={"client_grace_s": 0.0})
    rids = run_through(told, 13)
    known = [not isinstance(explain(told, rid), str) for rid in (rids[0], rids[2], rids[3], rids[-1])]
    assert known == [False, False, True, True]


def taken(told, count):
    """The memory after so many requests, and what the timelines count for."""
    run_through(told, count)
    gc.collect()  # requests and their choices refer to each other
    return tracemalloc.get_traced_memory()[0], told.core.observer.timelines.kept_bytes


def test_they_take_no_more_memory_than_they_count_for():
    told = serving("p1", "d1", limits={"client_grace_s": 0.0})
    tracemalloc.start()
    (before, counted), (after, counts) = (taken(told, count) for count in (300, 200))  # 300: the history is full
    tracemalloc.stop()
    assert after - before <= counts - counted <= 2 * (after - before)


def test_the_oldest_ones_give_way_when_the_memory_is_full():
    told = serving("p1", "d1", limits={"client_grace_s": 0.0})
    run_through(told, 5)
    told.core.observer.timelines.most_bytes = most = told.core.observer.timelines.kept_bytes
    run_through(told, 3)
    assert told.core.observer.timelines.kept_bytes <= most
    known = [number for number in range(1, 9) if not isinstance(explain(told, f"r{number}"), str)]
    assert known == [4, 5, 6, 7, 8]


def test_without_memory_none_is_kept_and_an_open_choice_is_told_without_its_past():
    told = serving("p1", "d1", limits={"timelines_mib": 0})
    told.tell(submit(), tokens("p1", RID, 0, 7))
    found = explain(told)
    assert (found.stage, found.outputs, found.stages, found.events, found.steps) == (Stage.MOVING, 1, [], [], [])
    told.tell(cancel())
    told.later(GRACE_S + 0.1)
    assert isinstance(explain(told), str)


def test_an_open_choice_beyond_the_memory_has_no_past_until_there_is_space_again():
    told = large(timelines_mib=1, client_grace_s=0.0)
    asked = [submit(key, max_tokens=1 << 13) for key in "abcdefghijklmnopqrst"]  # 67,584 bytes each
    assert not any(isinstance(reply, Refused) for reply in replies(told.tell(*asked)))
    assert [bool(explain(told, f"r{number}").stages) for number in (1, 15, 16, 20)] == [True, True, False, False]
    told.tell(cancel("r1"))
    told.later(0.1)
    told.tell(submit("z"))
    assert explain(told, "r21").stages
