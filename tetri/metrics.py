"""Percentiles and summaries of measured values, for the tools, the simulator and the reports."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


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
