"""Latencies and rates of the deployment over some seconds, from what two Observations differ in."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from msgspec import to_builtins

from tetri.metrics import Bucketed, added, gained
from tetri.wire.clients import Observation
from tetri.wire.observation import Activity, Transferred

_STEPS = ("steps", "chunk_tokens", "chunk_space", "decode_steps", "decode_tokens")  # of Activity, that are shown
IDLE, NOTHING = Activity(), Transferred()


class Span(NamedTuple):
    """The deployment between two Observations. `seconds`: None for all since the broker's start. `queue`: seconds of
    prefill work before a request, (predicted, real) means. None: nothing of it happened."""

    seconds: float | None
    ttft: Bucketed | None
    tpot: Bucketed | None
    queue: tuple[float | None, float | None]
    ended: int  # choices
    slo_requests: dict[str, int]  # how they kept their limits of latency, by result
    tokens: int  # output tokens
    activities: dict[str, Activity]  # iid -> what it has done, a process that has started since then from its start

    @property
    def goodput(self) -> float | None:
        """Requests per second that kept their limits of latency."""
        return self.slo_requests.get("met", 0) / self.seconds if self.seconds else None


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
    activities = {
        each.iid: _done(each.activity, known.get((each.iid, each.incarnation), IDLE)) for each in after.status.instances
    }
    return Span(
        seconds,
        ttft,
        tpot,
        (predicted.mean() if predicted else None, queued.mean() if queued else None),
        sum(gained({} if before is None else _ended(before), _ended(after)).values()),
        gained({} if before is None else before.status.slo_requests, after.status.slo_requests),
        (ttft.count if ttft else 0) + sum(each.decode_tokens for each in activities.values()),
        activities,
    )


def _done(now: Activity, before: Activity) -> Activity:
    """What a process has done since an earlier Activity, as far as it is shown."""
    steps = {name: getattr(now, name) - getattr(before, name) for name in _STEPS}
    received = {
        path: Transferred(bytes=each.bytes - before.received.get(path, NOTHING).bytes)
        for path, each in now.received.items()
    }
    return Activity(**steps, received=received)


def _ended(observation: Observation) -> dict[str, int]:
    return observation.measures.counts.get("requests_ended", {})
