"""From measured points to a cost table, and how well the table says what was measured.

Both halves have the same form: a step of x tokens (or requests) takes curve(x) + slope x load, where the load of a
chunk is its tokens times those before it, and that of a decode step the tokens of all contexts. Points with the same x
and different loads tell the slope, by least squares of relative errors, in which disturbed points weigh little; what it
leaves of each point tells the curve, by medians that are then made monotonic.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tetri.cost import Cost, Curve
from tetri.profile.measure import MeasuredPoint, ProfileError

KINDS = ("prefill", "decode", "packed", "mixed")
PEAK_SHARE = 0.95  # of the best prefill rate, at the knee
DIGITS = 5  # of every number in a table
PASSES = 20  # of weighing and fitting in turn
FAR = 0.02  # a relative error beyond which a point pulls no harder on the slope (Huber)

Row = tuple[float, float, float]  # x, load, seconds


@dataclass(frozen=True, slots=True)
class Quality:
    """Errors of predicted seconds, as a share of the measured ones; `r2` of the seconds (0 of a single point)."""

    points: int
    mean: float
    worst: float
    r2: float


@dataclass(frozen=True, slots=True)
class Fit:
    """`cost` has the curves, the slopes and the knee. `quality` of "fitted" and of "held out" points, and of both
    kinds by the kind of step (see `kind_of`): "decode" and "decode, held out". `spread`: mean over the points of
    Point.spread, what the machine itself varies by."""

    cost: Cost
    quality: dict[str, Quality]
    spread: float
    notes: tuple[str, ...]


def fit(points: Sequence[MeasuredPoint]) -> Fit:
    """Raises ProfileError when the points cannot make a table."""
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
    """prefill: a chunk of one prompt. packed: of several. decode: a decode step. mixed: both in one step."""
    if point.what.batch:
        return "mixed" if point.what.chunk else "decode"
    return "prefill" if len(point.what.chunk) == 1 else "packed"


def knee(prefill: Curve) -> int:
    """The smallest measured chunk with PEAK_SHARE of the best rate (tokens a second) of all measured chunks."""
    peak = max(tokens / seconds for tokens, seconds in prefill)
    return int(min(tokens for tokens, seconds in prefill if tokens / seconds >= PEAK_SHARE * peak))


def curve_and_slope(rows: Sequence[Row]) -> tuple[Curve, float | None]:
    """The curve by x, and seconds per unit of load; None when no x was measured under two loads."""
    slope = _slope(rows)
    groups: dict[float, list[float]] = defaultdict(list)
    for x, load, seconds in rows:
        groups[x].append(max(seconds - (slope or 0.0) * load, 0.0))
    xs = sorted(groups)
    levels = isotonic([float(np.median(groups[x])) for x in xs], [len(groups[x]) for x in xs])
    return tuple((x, _rounded(level)) for x, level in zip(xs, levels, strict=True)), slope


def _slope(rows: Sequence[Row]) -> float | None:
    """Least squares of relative errors over all x at once: a level for each x, and one slope for all."""
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
    """The nearest sequence that never falls, in weighted squares: neighbours that fall are pooled."""
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
