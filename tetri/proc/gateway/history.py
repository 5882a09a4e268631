"""What an onlooker wants to know of the last minutes, from one Observation a second."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from msgspec import Struct

from tetri.metrics import percentile

KEPT = 600  # points: one a second
SHARES = (0.5, 0.99)


class Point(Struct, frozen=True, gc=False):
    """The deployment over one second that ended at Unix time `at`. `ttft`, `tpot`: p50 and p99 in seconds; `queue`:
    predicted and real mean seconds in the queue. None: there was none."""

    at: float
    ttft: tuple[float, float] | None
    tpot: tuple[float, float] | None
    tokens_s: float
    requests_s: float
    queue: tuple[float, float] | None


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
    decode_tokens: int = 0


IDLE = Rates()


class History:
    """The points of the last minutes; `added`: how many there ever were. `rates`: of each instance."""

    def __init__(self) -> None:
        self.added = 0
        self.points: deque[Point] = deque(maxlen=KEPT)
        self.rates: dict[str, Rates] = {}
        self._ended: list[Mapping[str, Any]] = []  # choices, since the last point
        self._instances: dict[str, deque[InstancePoint]] = {}
        self._before: Mapping[str, Any] | None = None
        self._now = 0.0

    def instance(self, iid: str) -> Sequence[InstancePoint] | None:
        """The points of an instance, oldest first. None: it has none."""
        return self._instances.get(iid)

    def ended(self, choices: Iterable[Mapping[str, Any]]) -> None:
        """Take choices that have ended, for the next point."""
        self._ended.extend(choices)

    def advance(self, observation: Mapping[str, Any], now: float, at: float) -> None:
        """Add what has happened since the last call, unless the broker has started again. `now`: seconds of any clock
        that does not jump; `at`: Unix time."""
        before, seconds = self._before, now - self._now
        self._before, self._now = observation, now
        if before is not None and (before["epoch"] != observation["epoch"] or seconds <= 0):
            before = None
        known = {each["iid"]: each for each in before["status"]["instances"]} if before else {}
        instances = observation["status"]["instances"]
        self.rates = {each["iid"]: rates(known.get(each["iid"]), each, seconds) for each in instances}
        for each in instances:
            points = self._instances.setdefault(each["iid"], deque(maxlen=KEPT))
            points.append(_instance_point(each, self.rates[each["iid"]], at))
        self._instances = {iid: points for iid, points in self._instances.items() if points[-1].at > at - KEPT}
        ended, self._ended = self._ended, []
        if before is not None:
            tokens = sum(each.decode_tokens for each in self.rates.values())
            self.points.append(_point(before["measures"], observation["measures"], ended, tokens, seconds, at))
            self.added += 1


def rates(before: Mapping[str, Any] | None, after: Mapping[str, Any], seconds: float) -> Rates:
    """What an instance did between two of its states. A process that has started again in between counts from 0."""
    if before is None or before["incarnation"] != after["incarnation"]:
        return IDLE
    old, new = before["activity"], after["activity"]

    def more(name: str) -> int:
        return int(new[name] - old[name])

    received = sum(each["bytes"] for each in new["received"].values())
    received -= sum(each["bytes"] for each in old["received"].values())
    space, steps = more("chunk_space"), more("decode_steps")
    return Rates(
        fill=more("chunk_tokens") / space if space > 0 else None,
        batch=more("decode_tokens") / steps if steps > 0 else None,
        received_bytes_s=max(received, 0) / seconds,
        decode_tokens=max(more("decode_tokens"), 0),
    )


def _instance_point(each: Mapping[str, Any], did: Rates, at: float) -> InstancePoint:
    load = each["load"]
    counts = load["queued"], load["waiting"], load["running"], load["free_blocks"]
    return InstancePoint(at, each["role"], each["state"], *counts, load["busy"], did.fill, did.batch)


def _point(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    ended: Sequence[Mapping[str, Any]],
    decoded: int,
    seconds: float,
    at: float,
) -> Point:
    def new(name: str) -> Histogram | None:
        return added(before["histograms"].get(name), after["histograms"].get(name))

    def tpots(found: Histogram | None) -> tuple[float, float] | None:
        values = [each["tpot_s"] for each in ended if each["tpot_s"] is not None]
        if found is not None and found.count == len(values):  # all are known, so that no bucket blurs them
            half, most = (percentile(values, share) for share in SHARES)
            return half, most
        return found.percentiles() if found is not None else None

    ttft, tpot, predicted, queued = map(new, ("ttft", "tpot", "queue_predicted", "stage_queued"))
    counts = [sum(each["counts"].get("requests_ended", {}).values()) for each in (before, after)]
    tokens = decoded + (ttft.count if ttft else 0)  # prefill instances write the first ones
    return Point(
        at=at,
        ttft=ttft.percentiles() if ttft else None,
        tpot=tpots(tpot),
        tokens_s=tokens / seconds,
        requests_s=(counts[1] - counts[0]) / seconds,
        queue=(predicted.mean(), queued.mean()) if predicted and queued else None,
    )


class Histogram(Struct, frozen=True):
    """Values by bucket, as in wire/observation.py. Not empty."""

    bounds: Sequence[float]
    counts: Sequence[int]
    total: float

    @property
    def count(self) -> int:
        """The number of values."""
        return sum(self.counts)

    def mean(self) -> float:
        """The mean."""
        return self.total / self.count

    def percentiles(self) -> tuple[float, float]:
        """p50 and p99, as exact as the buckets are; that of a single value is exact."""
        if self.count == 1:
            return self.total, self.total
        half, most = (self._percentile(share) for share in SHARES)
        return half, most

    def _percentile(self, share: float) -> float:
        """Values are taken as spread evenly over their bucket; those above all bounds as equal to the last bound."""
        rank, below = share * self.count, 0
        for index, (count, high) in enumerate(zip(self.counts, self.bounds, strict=False)):
            if count and below + count >= rank:
                low = self.bounds[index - 1] if index else 0.0
                return low + (high - low) * (rank - below) / count
            below += count
        return self.bounds[-1]


def added(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> Histogram | None:
    """The values that came to a histogram; None if there are none."""
    if after is None:
        return None
    old, total = (before["counts"], before["total"]) if before else ([0] * len(after["counts"]), 0.0)
    counts = [new - was for new, was in zip(after["counts"], old, strict=True)]
    if sum(counts) <= 0:
        return None
    return Histogram(after["bounds"], counts, after["total"] - total)
