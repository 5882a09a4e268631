"""Latencies and rates of the last seconds, from what two Observations differ in."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from msgspec import to_builtins

from tetri.metrics import added, gained
from tetri.wire.clients import Observation
from tetri.wire.observation import Activity

_STEPS = ("steps", "chunk_tokens", "chunk_space", "decode_steps", "decode_tokens")  # of Activity, that are shown


class Span(NamedTuple):
    """The deployment between two Observations. `seconds`: None for all since the broker's start. `queue`: seconds of
    prefill work before a request, (predicted, real) means. None: nothing of it happened."""

    seconds: float | None
    ttft: tuple[float, float] | None  # p50, p99
    tpot: tuple[float, float] | None
    queue: tuple[float | None, float | None]
    ended: int  # choices
    slo_requests: dict[str, int]  # how they kept their limits of latency, by result
    tokens: int  # output tokens
    activities: dict[str, Activity]  # iid -> what it has done


class Window:
    """The Observations of the last `length_s` seconds."""

    def __init__(self, length_s: float) -> None:
        self._length_s = length_s
        self._seen: deque[tuple[float, Observation]] = deque()

    def add(self, now: float, observation: Observation) -> Span:
        """Take the newest Observation, and return the Span since the oldest that is kept."""
        if self._seen and self._seen[-1][1].epoch != observation.epoch:  # the broker was started again
            self._seen.clear()
        self._seen.append((now, observation))
        while len(self._seen) > 2 and self._seen[1][0] <= now - self._length_s:
            self._seen.popleft()
        at, first = self._seen[0]
        return since(first, observation, now - at) if len(self._seen) > 1 else since(None, observation, None)


def since(before: Observation | None, after: Observation, seconds: float | None) -> Span:
    """What has happened from one Observation to a later one, which is `seconds` younger."""
    old, new = ({} if each is None else to_builtins(each.measures.histograms) for each in (before, after))
    ttft, tpot, predicted, queued = (
        added(old.get(name), new.get(name)) for name in ("ttft", "tpot", "queue_predicted", "stage_queued")
    )
    known = {} if before is None else {(each.iid, each.incarnation): each.activity for each in before.status.instances}
    now = {each.iid: (each.activity, known.get((each.iid, each.incarnation))) for each in after.status.instances}
    activities = {iid: _done(activity, earlier) for iid, (activity, earlier) in now.items()}
    return Span(
        seconds,
        ttft.percentiles() if ttft else None,
        tpot.percentiles() if tpot else None,
        (predicted.mean() if predicted else None, queued.mean() if queued else None),
        _ended(after) - (0 if before is None else _ended(before)),
        gained({} if before is None else before.status.slo_requests, after.status.slo_requests),
        (ttft.count if ttft else 0) + sum(each.decode_tokens for each in activities.values()),
        activities,
    )


def _done(now: Activity, before: Activity | None) -> Activity:
    """The steps of one process since an earlier Activity; None: since its start."""
    if before is None:
        return now
    steps = {name: getattr(now, name) - getattr(before, name) for name in _STEPS}
    return Activity(**steps)


def _ended(observation: Observation) -> int:
    return sum(observation.measures.counts.get("requests_ended", {}).values())
