"""The result of one run of the sweep: how many requests keep their limits, and the times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tetri.metrics import summarise
from tetri.request import Slo
from tetri.sim.sweep.cases import Case
from tetri.sim.traces import Arrival

QUARTILES = 4
Times = tuple[float, float, float]  # seconds: TTFT, TPOT (0 without a second token), JCT
Served = Sequence[tuple[Arrival, Times | None]]  # in order of arrival; None: it has not ended


@dataclass(frozen=True, slots=True)
class Attainment:
    """The share of requests that keep both limits; that of each quartile of length (prompt and output tokens), the
    short ones first."""

    share: float
    quartiles: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Spread:
    """Seconds."""

    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one run. `attained`: by regime; a fixed arrangement does not depend on it, so that one run has all
    of them. `certain`: the run was stopped when it was certain that no regime attains as much as was asked for; its
    shares are then what it had attained so far, and there are no times."""

    rate: float
    attained: Mapping[str, Attainment]
    ttft: Spread | None
    tpot: Spread | None
    jct: Spread | None
    certain: bool = False


def keeps(times: Times | None, slo: Slo) -> bool:
    """Whether a request keeps both limits."""
    return times is not None and times[0] <= (slo.ttft_s or 0.0) and times[1] <= (slo.tpot_s or 0.0)


def result_of(case: Case, rate: float, served: Served, slos: Mapping[str, Slo], certain: bool = False) -> Result:
    """The result of a run of the case: of its requests that count."""
    attained = {regime: _attainment(case, served, slo) for regime, slo in slos.items()}
    first, last = case.counted(case.requests)
    times = [each for _, each in served[first:last] if each is not None]
    if certain or not times:
        return Result(rate, attained, None, None, None, certain)
    ttft, tpot, jct = (_spread(values) for values in zip(*times, strict=True))
    return Result(rate, attained, ttft, tpot, jct)


def _attainment(case: Case, served: Served, slo: Slo) -> Attainment:
    first, last = case.counted(case.requests)
    some = sorted(served[first:last], key=lambda each: each[0].prompt + each[0].output)
    kept = [keeps(times, slo) for _, times in some]
    borders = [len(kept) * part // QUARTILES for part in range(QUARTILES + 1)]
    parts = [kept[start:stop] for start, stop in zip(borders, borders[1:], strict=False)]
    return Attainment(sum(kept) / (last - first), tuple(sum(part) / max(len(part), 1) for part in parts))


def _spread(values: Sequence[float]) -> Spread:
    made = summarise(values)
    return Spread(made.mean, made.p50, made.p90, made.p99)
