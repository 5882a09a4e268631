"""What the runs of a comparison say: values of an arrangement, and its ratio to another one's with an interval.

An interval is a bootstrap's: repeats are drawn again, and in each its requests, the same ones of both arrangements,
since both served the same requests. So it includes what differs between repeats, and what one odd request does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from tetri.bench.compare.load import Answer
from tetri.request import Slo

DRAWS, LEAST_DRAWS, MOST_NUMBERS = 2000, 200, 10_000_000  # fewer draws of so many requests that memory would matter
LOW, HIGH = 2.5, 97.5  # percent
Values = np.ndarray[Any, np.dtype[np.float64]]  # by repeat and request; NaN: it failed


class Metric(NamedTuple):
    """A metric of many requests. `of`: the value of each request; `joined`: that of all, along the last axis."""

    name: str
    of: Callable[[Answer, Slo], float]
    joined: Callable[[Values], Values]
    higher: bool = False  # more is better


def _mean(values: Values) -> Values:
    return np.asarray(values.mean(axis=-1))


def _p99(values: Values) -> Values:
    return np.asarray(np.percentile(values, 99, axis=-1))


TTFT, TTFT_P99, JCT, TPOT, TPOT_P99, ATTAINED = METRICS = (
    Metric("TTFT mean", lambda each, _: each.ttft_s, _mean),
    Metric("TTFT p99", lambda each, _: each.ttft_s, _p99),
    Metric("JCT mean", lambda each, _: each.jct_s, _mean),
    Metric("TPOT mean", lambda each, _: each.tpot_s, _mean),
    Metric("TPOT p99", lambda each, _: each.tpot_s, _p99),
    Metric("attained", lambda each, slo: float(each.keeps(slo)), _mean, True),
)


class Estimate(NamedTuple):
    """A value and the interval in which 95 of 100 such values lie; None where there is nothing to compare."""

    value: float | None
    low: float | None
    high: float | None


def values(metric: Metric, repeats: Sequence[Sequence[Answer]], slo: Slo) -> Values:
    """The metric of each request of each repeat. One that failed keeps no limit; it has no times."""
    rows = [[metric.of(a, slo) if metric.higher or not a.error else np.nan for a in answers] for answers in repeats]
    return np.array(rows, dtype=float)


def value(metric: Metric, found: Values) -> float | None:
    """The metric over all requests of all repeats; None if all failed."""
    there = found[~np.isnan(found)]
    return float(metric.joined(there)) if there.size else None


def compared(metric: Metric, ours: Values, theirs: Values) -> Estimate:
    """Our value divided by theirs; of attainment, the difference. Only requests that both served count for times."""
    both = ~(np.isnan(ours) | np.isnan(theirs))
    counts = tuple(int(count) for count in both.sum(axis=1) if count)
    if not counts:
        return Estimate(None, None, None)
    pairs = np.stack([ours[both], theirs[both]])
    low, high = np.percentile(_against(metric, pairs[:, _drawn_again(counts)]), (LOW, HIGH))
    return Estimate(float(_against(metric, pairs)), float(low), float(high))


def _against(metric: Metric, pairs: Values) -> Values:
    mine, other = metric.joined(pairs)
    return np.asarray(mine - other if metric.higher else mine / other)


@cache
def _drawn_again(counts: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Places of requests, of which each repeat has so many, one after the other: each row has those of repeats that are
    drawn, and of these again."""
    repeats, most, sizes = len(counts), max(counts), np.array(counts)
    draws = min(max(MOST_NUMBERS // (repeats * most), LEAST_DRAWS), DRAWS)
    rng = np.random.default_rng(0)
    chosen = rng.integers(repeats, size=(draws, repeats, 1))
    starts = np.cumsum(sizes) - sizes
    places = starts[chosen] + (rng.random((draws, repeats, most)) * sizes[chosen]).astype(int)
    return np.asarray(places.reshape(draws, -1))


class Cell(NamedTuple):
    """What is compared: one workload at one rate under one regime's limits."""

    workload: str
    rate: str
    regime: str


def goodput(points: Sequence[tuple[float, float]], goal: float = 0.9) -> float | None:
    """The highest rate at which the share attained is `goal`, between the two (rate, share) around it; None if it lies
    outside the measured rates."""
    ordered = sorted(points)
    found = None
    for (rate, share), (higher, less) in zip(ordered, ordered[1:], strict=False):
        if share >= goal > less:
            found = rate + (higher - rate) * (share - goal) / (share - less)
    return found
