"""Timelines as a trace that ui.perfetto.dev and trace_processor open, in Chrome's JSON format: an instance is a process
there, and each choice has threads of its own in it, for its stages, chunks, steps and KV."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import count, pairwise
from typing import Any, NamedTuple

from tetri.cli.waterfall import detail
from tetri.request import choice_id
from tetri.wire.observation import StageSpan, Timeline, TraceEvent

THREADS = {"chunk": "chunks", "recompute": "chunks", "export": "KV", "fetch": "KV"}  # of what lasts, by its kind
_NOWHERE = "broker"  # has the stages that no instance holds


class _Slice(NamedTuple):
    """`start` and `end` in ns; `pid` and `tid`: the track that it is on."""

    start: int
    end: int
    pid: int
    tid: int


class _Tracks:
    """Numbers for processes and threads; tells their names."""

    def __init__(self) -> None:
        self._pids: dict[str, int] = {}
        self._tids: dict[tuple[str, str], tuple[int, int]] = {}
        self._ends: dict[int, int] = {}  # tid -> end of its last slice
        self.names: list[dict[str, Any]] = []

    def thread(self, iid: str, name: str) -> tuple[int, int]:
        """(pid, tid) of a thread of an instance."""
        iid = iid or _NOWHERE
        if iid not in self._pids:
            self._pids[iid] = len(self._pids) + 1
            self._name("process_name", self._pids[iid], 0, iid)
        if (iid, name) not in self._tids:
            self._tids[iid, name] = self._pids[iid], len(self._tids) + 1
            self._name("thread_name", *self._tids[iid, name], name)
        return self._tids[iid, name]

    def place(self, iid: str, name: str, start_s: float, lasted_s: float, parallel: bool = False) -> _Slice:
        """The place of the next slice of a thread: after the ones before, which end later only since clocks differ a
        little. `parallel`: on a further thread, if the slice overlaps with the ones before."""
        start, end = round(start_s * 1e9), round((start_s + lasted_s) * 1e9)
        for lane in count(1):
            pid, tid = self.thread(iid, name if lane == 1 else f"{name} {lane}")
            last = self._ends.get(tid, start)
            if last <= start or not parallel:
                break
        start = max(start, last)
        self._ends[tid] = end = max(start, end)
        return _Slice(start, end, pid, tid)

    def _name(self, kind: str, pid: int, tid: int, name: str) -> None:
        self.names.append({"name": kind, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}})


def trace(timelines: Iterable[tuple[float, Timeline]]) -> dict[str, Any]:
    """The trace of some choices. Each comes with the time at which its Timeline came, on one clock."""
    found = [(at - timeline.age_s, timeline) for at, timeline in timelines]
    first = min((arrival for arrival, _ in found), default=0.0)
    tracks, flows = _Tracks(), count(1)
    events = [event for arrival, each in found for event in _choice(each, arrival - first, tracks, flows)]
    return {"displayTimeUnit": "ms", "traceEvents": [*tracks.names, *events]}


def _choice(timeline: Timeline, arrival: float, tracks: _Tracks, flows: Iterator[int]) -> Iterator[dict[str, Any]]:
    name = choice_id(timeline.rid, timeline.choice)
    stages = [(span, tracks.place(span.iid, name, arrival + span.start_s, span.seconds)) for span in timeline.stages]
    for span, place in stages:
        yield _complete(str(span.stage), "stage", place, {"request": name, "attempt": span.attempt})
    yield from _flows(stages, name, flows)
    for step in sorted(timeline.steps, key=lambda step: step.start_s):
        place = tracks.place(step.iid, f"{name} steps", arrival + step.start_s, step.seconds)
        fields = {field: getattr(step, field) for field in ("tokens", "batch", "chunk_tokens", "passes")}
        yield _complete("step", "step", place, {"request": name, **fields})
    for event in sorted(timeline.events, key=lambda event: event.at):
        if event.kind in THREADS:
            kind = THREADS[event.kind]
            place = tracks.place(event.iid, f"{name} {kind}", arrival + event.at, event.seconds, kind == "KV")
            yield _complete(event.kind, kind, place, _args(event, name))
        else:
            pid, tid = tracks.thread(event.iid, name)
            at = {"ph": "i", "s": "t", "ts": (arrival + event.at) * 1e6, "pid": pid, "tid": tid}
            yield {"name": event.kind, "cat": "event", **at, "args": _args(event, name)}


def _args(event: TraceEvent, name: str) -> dict[str, Any]:
    sizes = {"first": event.first, "last": event.last, "size": event.size} if event.last else {}
    return {"request": name, "attempt": event.attempt, "what": detail(event), **sizes}


def _flows(stages: Sequence[tuple[StageSpan, _Slice]], name: str, flows: Iterator[int]) -> Iterator[dict[str, Any]]:
    """An arrow wherever the choice goes on at another instance."""
    lasting = [place for _, place in stages if place.end > place.start]
    for before, after in pairwise(lasting):
        if before.pid != after.pid:
            flow = {"name": name, "cat": "flow", "id": next(flows)}
            yield {**flow, "ph": "s", "ts": before.start / 1e3, "pid": before.pid, "tid": before.tid}
            yield {**flow, "ph": "f", "bp": "e", "ts": after.start / 1e3, "pid": after.pid, "tid": after.tid}


def _complete(name: str, category: str, place: _Slice, args: dict[str, Any]) -> dict[str, Any]:
    times = {"ts": place.start / 1e3, "dur": (place.end - place.start) / 1e3}  # in us
    return {"name": name, "cat": category, "ph": "X", **times, "pid": place.pid, "tid": place.tid, "args": args}
