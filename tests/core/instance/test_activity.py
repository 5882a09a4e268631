"""What an instance counts and traces for its heartbeats."""

from types import SimpleNamespace

import pytest

from tetri.core.instance.activity import MOST_EVENTS, ActivityLog
from tetri.wire.observation import Activity, EngineStep, TraceEvent, Transferred

CHOICE = SimpleNamespace(rid="r", attempt=2)


def after(*steps):
    """The log of an instance that has made these steps, each of a second, half a second apart."""
    log = ActivityLog(0.0)
    for step in steps:
        began = log.now + 0.5
        log.now = began + 1.0
        log.step_done(began, **step)
    return log


@pytest.mark.parametrize(
    ("steps", "activity"),
    [
        ([], Activity()),
        ([{"batch": 0, "passes": 1}], Activity()),  # it has only allocated blocks
        ([{"batch": 3, "passes": 4}], Activity(steps=4, step_s=1.0, decode_steps=4)),
        (
            [{"batch": 0, "passes": 1, "chunk_tokens": 6, "chunk_space": 8}],
            Activity(steps=1, step_s=1.0, chunk_steps=1, chunk_tokens=6, chunk_space=8),
        ),
        (
            [{"batch": 2, "passes": 1, "chunk_tokens": 6, "chunk_space": 6}, {"batch": 2, "passes": 1}],
            Activity(steps=2, step_s=2.0, chunk_steps=1, chunk_tokens=6, chunk_space=6, decode_steps=2),
        ),
        ([{"batch": 0, "passes": 1, "recomputed": 9}], Activity(steps=1, step_s=1.0, recomputed=9)),
        (  # memory was short, so the chunk was not the planned one
            [{"batch": 0, "passes": 1, "chunk_tokens": 7, "chunk_space": 6}],
            Activity(steps=1, step_s=1.0, chunk_steps=1, chunk_tokens=7, chunk_space=7),
        ),
    ],
)
def test_steps_are_counted_by_what_they_computed(steps, activity):
    assert after(*steps).report() == activity


def test_the_last_step_is_known_and_what_it_computed_lies_in_it():
    log = after({"batch": 1, "passes": 1}, {"batch": 2, "passes": 1, "chunk_tokens": 5, "recomputed": 3})
    assert log.step == EngineStep(at=3.0, seconds=1.0, batch=2, chunk_tokens=5)
    log.computed("chunk", CHOICE, 4, 9)
    assert log.traced() == [TraceEvent("chunk", "r", 2, at=2.0, seconds=1.0, first=4, last=9, size=10)]


def test_what_came_is_counted_by_path():
    log = ActivityLog(5.0)
    log.received("shm", 100, since=4.5)
    log.received("stream", 50, since=3.0)
    log.not_received("stream")
    log.received("stream", 50, since=4.0)
    log.not_received("cma")
    assert log.report().received == {
        "shm": Transferred(chunks=1, bytes=100, seconds=0.5),
        "stream": Transferred(chunks=2, bytes=100, seconds=3.0, failed=1),
        "cma": Transferred(failed=1),
    }


def test_events_are_told_once_as_far_as_they_fit_and_notes_are_cut():
    log = ActivityLog(1.0)
    log.add("refused", CHOICE, peer="d1", note="x" * 1000)
    log.now = 2.0
    log.add("export", CHOICE, 1.5, first=0, last=4, size=1)
    assert log.traced() == [
        TraceEvent("refused", "r", 2, at=1.0, peer="d1", note="x" * 200),
        TraceEvent("export", "r", 2, at=1.5, seconds=0.5, first=0, last=4, size=1),
    ]
    assert log.traced() == []
    for _ in range(MOST_EVENTS + 3):
        log.add("offered", CHOICE, peer="d1")
    assert len(log.traced()) == MOST_EVENTS
    log.add("granted", CHOICE, peer="d1")
    assert [event.kind for event in log.traced()] == ["granted"] and log.report().events_left_out == 3
