"""What an instance counts and traces for its heartbeats."""

from types import SimpleNamespace

import pytest

from tetri.core.instance.activity import MOST_EVENTS, ActivityLog
from tetri.wire.observation import Activity, EngineStep, TraceEvent, Transferred

CHOICE = SimpleNamespace(rid="r", attempt=2)


def after(*steps):
    """The log of an instance that has made these steps, each of a second, half a second apart: decodes, passes, and the
    tokens of spans."""
    log = ActivityLog(0.0)
    for batch, passes, *spans in steps:
        log.now += 1.5
        log.step_done(1.0, batch, passes)
        if spans:
            log.spans_done(*spans)
    return log


@pytest.mark.parametrize(
    ("steps", "activity"),
    [
        ([], Activity()),
        ([(0, 1)], Activity()),  # it has only allocated blocks
        ([(3, 4)], Activity(steps=4, step_s=1.0, decode_steps=4)),
        ([(0, 1, 6, 8, 0)], Activity(steps=1, step_s=1.0, chunk_steps=1, chunk_tokens=6, chunk_space=8)),
        (
            [(2, 1, 6, 6, 0), (2, 1)],
            Activity(steps=2, step_s=2.0, chunk_steps=1, chunk_tokens=6, chunk_space=6, decode_steps=2),
        ),
        ([(0, 1, 0, 8, 9)], Activity(steps=1, step_s=1.0, recomputed=9)),
        # Memory was short, so the chunk was not the planned one.
        ([(0, 1, 7, 6, 0)], Activity(steps=1, step_s=1.0, chunk_steps=1, chunk_tokens=7, chunk_space=7)),
    ],
)
def test_steps_are_counted_by_what_they_computed(steps, activity):
    assert after(*steps).report() == activity


def test_the_last_step_is_known_and_what_it_computed_lies_in_it():
    log = after((1, 1), (2, 1, 5, 5, 3))
    assert log.step == EngineStep(at=3.0, seconds=1.0, batch=2, chunk_tokens=5)
    log.computed("chunk", CHOICE, 4, 9)
    assert log.traced() == [TraceEvent("chunk", "r", 2, at=2.0, seconds=1.0, first=4, last=9, size=10)]


def test_fetches_are_traced_and_counted_by_path():
    log = ActivityLog(5.0)
    for since, size, path, problem in [
        (4.5, 100, "shm", None),
        (3.0, 50, "stream", None),
        (2.0, 50, "stream", "lost"),
        (4.0, 50, "stream", None),
        (4.0, 50, "cma", "flipped"),
    ]:
        log.fetched(CHOICE, since, "p1", 2, 4, size, path, problem)
    assert log.report().received == {
        "shm": Transferred(chunks=1, bytes=100, seconds=0.5),
        "stream": Transferred(chunks=2, bytes=100, seconds=3.0, failed=1),
        "cma": Transferred(failed=1),
    }
    first, *_, last = log.traced()
    place = {"peer": "p1", "first": 2, "last": 4}
    assert first == TraceEvent("fetch", "r", 2, at=4.5, seconds=0.5, **place, size=100, note="shm")
    assert last == TraceEvent("fetch", "r", 2, at=4.0, seconds=1.0, **place, size=0, note="cma: flipped")


def test_events_are_told_once_as_far_as_they_fit_and_notes_are_cut():
    log = ActivityLog(1.0)
    log.happened("refused", CHOICE, "d1", "x" * 1000)
    log.now = 2.0
    log.add("export", CHOICE, 1.5, "", 0, 4, 1)
    assert log.traced() == [
        TraceEvent("refused", "r", 2, at=1.0, peer="d1", note="x" * 200),
        TraceEvent("export", "r", 2, at=1.5, seconds=0.5, first=0, last=4, size=1),
    ]
    assert log.traced() == []
    for _ in range(MOST_EVENTS + 3):
        log.happened("offered", CHOICE, "d1")
    assert len(log.traced()) == MOST_EVENTS
    log.happened("granted", CHOICE, "d1")
    assert [event.kind for event in log.traced()] == ["granted"] and log.report().events_left_out == 3
