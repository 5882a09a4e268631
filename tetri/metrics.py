"""Percentiles and summaries of measured values, for the tools, the simulator and the reports."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SHARES = (0.5, 0.99)  # p50 and p99: what the page and top show


@dataclass(frozen=True, slots=True)
class Summary:
    """Mean, extremes and percentiles of `count` values, in the unit of the values."""

    count: int
    mean: float
    least: float
    p50: float
    p90: float
    p99: float
    most: float


def percentile(values: Sequence[float], share: float) -> float:
    """The percentile at `share` (0 to 1), interpolated linearly between neighbours, as numpy's default.

    Raises ValueError if there are no values, one is NaN, or `share` is out of range.
    """
    return _at(_ordered(values), share)


def summarise(values: Iterable[float]) -> Summary:
    """The Summary of some values. Raises ValueError if there are no values or one is NaN."""
    ordered = _ordered(values)
    middle, high, tail = (_at(ordered, share) for share in (0.5, 0.9, 0.99))
    mean = math.fsum(ordered) / len(ordered)
    return Summary(len(ordered), mean, ordered[0], middle, high, tail, ordered[-1])


@dataclass(frozen=True, slots=True)
class Bucketed:
    """Values of which only the buckets are known, as in the Histogram of wire/observation.py. There is at least one."""

    bounds: Sequence[float]
    counts: Sequence[int]
    total: float

    @property
    def count(self) -> int:
        """The number of values."""
        return sum(self.counts)

    def mean(self) -> float:
        """The exact mean."""
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


def gained(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    """What counters have grown, by name."""
    return {name: count - before.get(name, 0) for name, count in after.items()}


def attainment(results: Mapping[str, int]) -> float | None:
    """The share of requests that kept their limits, of those counted by result (Status.slo_requests); None of none."""
    total = sum(results.values())
    return results.get("met", 0) / total if total else None


def added(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> Bucketed | None:
    """The values that came to a histogram; None if there are none."""
    if after is None:
        return None
    old, total = (before["counts"], before["total"]) if before else ([0] * len(after["counts"]), 0.0)
    counts = [new - was for new, was in zip(after["counts"], old, strict=True)]
    if sum(counts) <= 0:
        return None
    return Bucketed(after["bounds"], counts, after["total"] - total)


def _ordered(values: Iterable[float]) -> list[float]:
    ordered = sorted(values)
    if not ordered:
        raise ValueError("there are no values to summarise")
    if any(math.isnan(value) for value in ordered):
        raise ValueError("NaN has no place in a summary")
    return ordered


def _at(ordered: Sequence[float], share: float) -> float:
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"a percentile's share is from 0 to 1, got {share:g}")
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    below, above = ordered[low], ordered[min(low + 1, len(ordered) - 1)]
    # Interpolation between equal neighbours could change the value by rounding.
    return below if below == above else below + (above - below) * (place - low)
