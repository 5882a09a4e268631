"""What an onlooker wants to know of the last minutes, from one Observation a second."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from tetri.metrics import SHARES, attainment, percentile
from tetri.rates import Span, since
from tetri.wire.clients import InstanceStatus, Observation
from tetri.wire.observation import Activity

KEPT = 600  # points: one a second


class Point(Struct, frozen=True, gc=False):
    """The deployment over one second that ended at Unix time `at`. `ttft`, `tpot`: p50 and p99 in seconds; `queue`:
    predicted and real mean seconds in the queue. `attainment`: the share of requests that kept their limits of latency,
    `goodput`: those a second. None: there was none."""

    at: float
    ttft: tuple[float, float] | None
    tpot: tuple[float, float] | None
    tokens_s: float
    requests_s: float
    queue: tuple[float, float] | None
    attainment: float | None
    goodput: float


class InstancePoint(Struct, frozen=True, gc=False):
    """An instance at Unix time `at`. `fill`, `batch`: of the second before; None: it computed nothing of that kind."""

    at: float
    role: str
    state: str
    queued: int
    waiting: int
    running: int
    free: int
    busy: float
    fill: float | None
    batch: float | None


class Rates(Struct, frozen=True, gc=False):
    """What an instance did in the last second."""

    fill: float | None = None
    batch: float | None = None
    received_bytes_s: float = 0.0


IDLE = Rates()


class History:
    """The points of the last minutes; `added`: how many there ever were. `rates`: of each instance."""

    def __init__(self) -> None:
        self.added = 0
        self.points: deque[Point] = deque(maxlen=KEPT)
        self.rates: dict[str, Rates] = {}
        self._tpots: list[float] = []  # of choices that have ended since the last point
        self._instances: dict[str, deque[InstancePoint]] = {}
        self._before: Observation | None = None
        self._now = 0.0

    def instance(self, iid: str) -> Sequence[InstancePoint] | None:
        """The points of an instance, oldest first. None: it has none."""
        return self._instances.get(iid)

    def ended(self, choices: Iterable[Mapping[str, Any]]) -> None:
        """Take choices that have ended, for the next point."""
        self._tpots += [each["tpot_s"] for each in choices if each["tpot_s"] is not None]

    def advance(self, observation: Mapping[str, Any], now: float, at: float) -> None:
        """Add what has happened since the last call, unless the broker has started again. `now`: seconds of any clock
        that does not jump; `at`: Unix time."""
        found = msgspec.convert({**observation, "moves": [], "ended": [], "events": []}, Observation)
        before, seconds = self._before, now - self._now
        self._before, self._now = found, now
        tpots, self._tpots = self._tpots, []
        self.rates = {}
        if before is not None and before.epoch == found.epoch and seconds > 0:
            span = since(before, found, seconds)
            self.rates = {iid: _rates(did, seconds) for iid, did in span.activities.items()}
            self.points.append(_point(span, tpots, seconds, at))
            self.added += 1
        for each in found.status.instances:
            points = self._instances.setdefault(each.iid, deque(maxlen=KEPT))
            points.append(_instance_point(each, self.rates.get(each.iid, IDLE), at))
        self._instances = {iid: points for iid, points in self._instances.items() if points[-1].at > at - KEPT}


def _rates(did: Activity, seconds: float) -> Rates:
    return Rates(
        fill=did.chunk_tokens / did.chunk_space if did.chunk_space else None,
        batch=did.decode_tokens / did.decode_steps if did.decode_steps else None,
        received_bytes_s=sum(each.bytes for each in did.received.values()) / seconds,
    )


def _instance_point(each: InstanceStatus, did: Rates, at: float) -> InstancePoint:
    load = each.load
    counts = load.queued, load.waiting, load.running, max(load.free_blocks, 0)
    return InstancePoint(at, each.role, each.state, *counts, load.busy, did.fill, did.batch)


def _point(span: Span, tpots: list[float], seconds: float, at: float) -> Point:
    """`tpots`: those of the choices that are known to have ended."""
    tpot, (predicted, real) = None if span.tpot is None else span.tpot.percentiles(), span.queue
    if span.tpot is not None and span.tpot.count == len(tpots):  # all are known, so that no bucket blurs them
        half, most = (percentile(tpots, share) for share in SHARES)
        tpot = half, most
    return Point(
        at=at,
        ttft=span.ttft.percentiles() if span.ttft else None,
        tpot=tpot,
        tokens_s=span.tokens / seconds,
        requests_s=span.ended / seconds,
        queue=None if predicted is None or real is None else (predicted, real),
        attainment=attainment(span.slo_requests),
        goodput=span.goodput or 0.0,
    )
