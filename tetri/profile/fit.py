"""Fits a cost table to measured points, and reports the errors of the fit.

Prefill and decode use the same model: a step of x tokens (or requests) takes curve(x) + slope * load seconds. The load
of a chunk is its tokens times the tokens before it; the load of a decode step is the tokens of all contexts. Points
with equal x and different loads give the slope, by least squares of relative errors in which disturbed points weigh
little. The rest of each point gives the curve, by medians that are then made monotonic.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tetri.cost import Cost, Curve
from tetri.profile.measure import MeasuredPoint, ProfileError

KINDS = ("prefill", "decode", "packed", "mixed")
PEAK_SHARE = 0.95  # the knee has this share of the best prefill rate
DIGITS = 5  # significant digits of all numbers in a table
PASSES = 20  # iterations of weighting and fitting
FAR = 0.02  # relative error from which a point's influence on the slope no longer grows (Huber)

Row = tuple[float, float, float]  # x, load, seconds


@dataclass(frozen=True, slots=True)
class Quality:
    """Errors of the predicted seconds. `mean`, `worst`: relative to the measured seconds; `r2`: coefficient of
    determination of the seconds, 0 for a single point."""

    points: int
    mean: float
    worst: float
    r2: float


@dataclass(frozen=True, slots=True)
class Fit:
    """The result of a fit. `cost`: the cost table. `quality`: by group of points: "fitted" and "held out", and both for
    each kind of step (`kind_of`), such as "decode" and "decode, held out". `spread`: mean of MeasuredPoint.spread, the
    machine's own variation. `notes`: what could not be measured, one line each."""

    cost: Cost
    quality: dict[str, Quality]
    spread: float
    notes: tuple[str, ...]


def fit(points: Sequence[MeasuredPoint]) -> Fit:
    """Fit a cost table. Raises ProfileError when the points do not suffice or contradict one another."""
    if not points or min(point.seconds for point in points) <= 0:
        raise ProfileError("steps that take no time cannot be measured: give the emulated engine a cost table")
    seen = [point for point in points if not point.held_out]
    alone = {point.what.tokens for point in seen if kind_of(point) == "prefill" and not point.what.pairs}
    chunks = [
        (float(p.what.tokens), float(p.what.pairs), p.seconds)
        for p in seen
        if kind_of(p) == "prefill" and p.what.tokens in alone
    ]
    decodes = [(float(p.what.batch), float(p.what.context), p.seconds) for p in seen if kind_of(p) == "decode"]
    if not chunks or not decodes:
        raise ProfileError("the engine's memory holds neither a chunk nor a batch to measure")
    prefill, start_s = curve_and_slope(chunks)
    if prefill[0][1] <= 0:
        least = f"a chunk of {prefill[0][0]:.0f} tokens would take no time"
        raise ProfileError(f"{least} by the measured ones, which contradict one another: measure again, undisturbed")
    decode, context_s = curve_and_slope(decodes)
    cost = Cost(prefill, decode, start_s or 0.0, context_s or 0.0, chunk_tokens=knee(prefill))
    notes = list(_notes(cost, start_s, context_s))
    return Fit(cost, _qualities(cost, points), float(np.mean([p.spread for p in points])), tuple(notes))


def kind_of(point: MeasuredPoint) -> str:
    """The kind of step. prefill: a chunk of one prompt; packed: a chunk of several; decode: a decode step; mixed: chunk
    and decodes in one step."""
    if point.what.batch:
        return "mixed" if point.what.chunk else "decode"
    return "prefill" if len(point.what.chunk) == 1 else "packed"


def knee(prefill: Curve) -> int:
    """The smallest measured chunk, in tokens, with PEAK_SHARE of the best rate (tokens a second) of all chunks."""
    peak = max(tokens / seconds for tokens, seconds in prefill)
    return int(min(tokens for tokens, seconds in prefill if tokens / seconds >= PEAK_SHARE * peak))


def curve_and_slope(rows: Sequence[Row]) -> tuple[Curve, float | None]:
    """The curve over x, and the slope in seconds per unit of load, None when no x was measured with two loads."""
    slope = _slope(rows)
    groups: dict[float, list[float]] = defaultdict(list)
    for x, load, seconds in rows:
        groups[x].append(max(seconds - (slope or 0.0) * load, 0.0))
    xs = sorted(groups)
    levels = isotonic([float(np.median(groups[x])) for x in xs], [len(groups[x]) for x in xs])
    return tuple((x, _rounded(level)) for x, level in zip(xs, levels, strict=True)), slope


def _slope(rows: Sequence[Row]) -> float | None:
    """The slope, by least squares of relative errors over all x at once: one level for each x, one slope for all."""
    xs = sorted({x for x, _, _ in rows})
    if len({(x, load) for x, load, _ in rows}) == len(xs):
        return None
    seconds = np.array([row[2] for row in rows])
    loads = np.array([row[1] for row in rows])
    scale = float(loads.max())
    design = np.zeros((len(rows), len(xs) + 1))
    design[np.arange(len(rows)), [xs.index(x) for x, _, _ in rows]] = 1.0
    design[:, -1] = loads / scale
    design /= seconds[:, None]
    weights = np.ones(len(rows))
    for _ in range(PASSES):
        found = np.linalg.lstsq(design * weights[:, None], weights, rcond=None)[0]
        weights = np.sqrt(FAR / np.maximum(np.abs(design @ found - 1.0), FAR))
    return _rounded(max(float(found[-1]) / scale, 0.0))


def isotonic(levels: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Isotonic regression: the non-decreasing sequence with the least weighted squared distance (pool adjacent
    violators)."""
    pools: list[tuple[float, float, int]] = []  # level, weight, length
    for level, weight in zip(levels, weights, strict=True):
        length = 1
        while pools and pools[-1][0] > level:
            before, heavy, more = pools.pop()
            level = (before * heavy + level * weight) / (heavy + weight)
            weight, length = weight + heavy, length + more
        pools.append((level, weight, length))
    return [level for level, _, length in pools for _ in range(length)]


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def predicted(cost: Cost, point: MeasuredPoint) -> float:
    """Seconds of the point's step by the cost table."""
    return cost.step_s(point.what.spans, point.what.batch, point.what.context)


def _qualities(cost: Cost, points: Sequence[MeasuredPoint]) -> dict[str, Quality]:
    groups: dict[str, list[MeasuredPoint]] = {"fitted": [], "held out": []}
    for kind in KINDS:
        groups |= {kind: [], f"{kind}, held out": []}
    for point in points:
        kind = kind_of(point)
        for name in ("held out", f"{kind}, held out") if point.held_out else ("fitted", kind):
            groups[name].append(point)
    return {name: quality(cost, group) for name, group in groups.items() if group}


def quality(cost: Cost, points: Sequence[MeasuredPoint]) -> Quality:
    """Errors of the cost table over these points, at least one."""
    seconds = np.array([point.seconds for point in points])
    errors = np.array([predicted(cost, point) for point in points]) - seconds
    relative = np.abs(errors) / seconds
    varies = float(((seconds - seconds.mean()) ** 2).sum())
    r2 = 1.0 - float((errors**2).sum()) / varies if varies else 0.0
    return Quality(len(points), float(relative.mean()), float(relative.max()), r2)


def _notes(cost: Cost, start_s: float | None, context_s: float | None) -> Iterable[str]:
    if start_s is None:
        yield "no prompt was longer than a chunk, so prefill_start_s is unknown: use a smaller engine.chunk_tokens"
    if context_s is None:
        yield "no batch was measured with two lengths of context, so decode_context_s is unknown"
    if cost.chunk_tokens == cost.prefill[-1][0]:
        yield "the prefill rate still grew at the largest chunk: a larger engine.chunk_tokens may show the knee"
