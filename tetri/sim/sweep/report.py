"""The report of a sweep: each case in a row, and whether auto is as good as it should be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import inf
from statistics import fmean
from typing import Any

from tetri.sim.sweep.cases import SHIFT, Case
from tetri.sim.sweep.explore import Standing, best

FIRM = 8  # instances: of fewer, the bound says little


@dataclass(frozen=True, slots=True)
class Row:
    """One case: its bound, the fixed arrangements and auto."""

    case: Case
    fixed: Sequence[Standing]
    auto: Standing

    @property
    def best(self) -> Standing:
        """The best fixed arrangement."""
        return best(self.fixed)

    @property
    def ratio(self) -> float:
        """The goodput of auto, of that of the best fixed arrangement."""
        return (self.auto.goodput or 0.0) / (self.best.goodput or 1.0)

    @property
    def of_bound(self) -> float:
        """The goodput of auto, of the fluid bound."""
        return (self.auto.goodput or 0.0) / self.case.bound

    @property
    def worst_quartile(self) -> float:
        """The attainment of the quartile of length that has the least, at auto's goodput."""
        near = self.auto.near
        return 0.0 if near is None else min(near.attained[self.case.regime].quartiles)

    @property
    def tail(self) -> float:
        """p99 of TTFT with auto, of that with the best fixed arrangement, at the same rate: the goodput of the latter;
        infinite if one of them is unknown."""
        mine, other = self.auto.beside, self.best.near
        if mine is None or other is None or mine.ttft is None or other.ttft is None:
            return inf
        return mine.ttft.p99 / other.ttft.p99

    def over(self, kind: str) -> float:
        """The goodput of auto, of that of the best arrangement whose name begins with `kind`."""
        return (self.auto.goodput or 0.0) / (best(self.fixed, kind).goodput or 1.0)


@dataclass(frozen=True, slots=True)
class Check:
    """One promise about the rows: how many of those that it is about keep it, or a mean."""

    promise: str
    value: float
    goal: float
    cases: int

    @property
    def holds(self) -> bool:
        """Whether the goal is reached."""
        return self.value >= self.goal

    def as_json(self) -> dict[str, Any]:
        """This check as plain values."""
        return {**asdict(self), "holds": self.holds}


def checks(rows: Sequence[Row], held_back: Sequence[Row] = ()) -> list[Check]:
    """What auto should reach. `held_back`: rows to compare the mean ratio with."""
    firm = [row for row in rows if row.case.instances >= FIRM]
    balanced = [row for row in rows if row.case.regime == "balanced"]
    shift = [row for row in rows if row.case.workload == SHIFT]
    made = [
        _share("auto >= 0.97 x best fixed", rows, lambda row: row.ratio >= 0.97, 0.9),
        _share("auto >= 0.92 x best fixed", rows, lambda row: row.ratio >= 0.92, 1.0),
        _mean("mean of auto / best fixed", rows, 1.02),
        _mean("mean of auto / best fixed, balanced", balanced, 1.03),
        _share(f"auto >= 0.80 x bound, {FIRM} instances or more", firm, lambda row: row.of_bound >= 0.8, 1.0),
        _share("every quartile of length attains 0.80", rows, lambda row: row.worst_quartile >= 0.8, 1.0),
        _share("p99 TTFT <= 1.5 x best fixed, at its rate", rows, lambda row: row.tail <= 1.5, 1.0),
        _share("shift: auto >= 1.1 x best split", shift, lambda row: row.over("split") >= 1.1, 1.0),
        _share("shift: auto >= 1.0 x coupled least-loaded", shift, lambda row: row.over("coupled-ll") >= 1.0, 1.0),
    ]
    if held_back and rows:
        near = 0.03 - abs(fmean(row.ratio for row in held_back) - fmean(row.ratio for row in rows))
        made.append(Check("held-back cases: mean within 0.03 of the others", near, 0.0, len(held_back)))
    return [check for check in made if check.cases]


def _share(promise: str, rows: Sequence[Row], keeps: Callable[[Row], bool], goal: float) -> Check:
    return Check(promise, sum(map(keeps, rows)) / max(len(rows), 1), goal, len(rows))


def _mean(promise: str, rows: Sequence[Row], goal: float) -> Check:
    return Check(promise, fmean([row.ratio for row in rows] or [0.0]), goal, len(rows))


def table(rows: Iterable[Row]) -> Iterator[str]:
    """The lines of a table of the rows."""
    head = f"{'best fixed':18}{'req/s':>9}{'auto':>9}{'ratio':>7}{'bound':>7}{'quartile':>9}{'p99 TTFT':>9}"
    yield f"{'case':42}{head}"
    for row in rows:
        rival = row.best
        yield (
            f"{row.case.name:42}{rival.arrangement:18}{rival.goodput or 0.0:9.3f}{row.auto.goodput or 0.0:9.3f}"
            f"{row.ratio:7.3f}{row.of_bound:7.3f}{row.worst_quartile:9.3f}{row.tail:9.2f}"
        )


def verdicts(made: Iterable[Check]) -> Iterator[str]:
    """A line for each check."""
    for check in made:
        verdict = "holds" if check.holds else "fails"
        yield f"{verdict}  {check.promise}: {check.value:.3f}, wanted {check.goal:g} ({check.cases} cases)"


def as_json(row: Row) -> dict[str, Any]:
    """A row as plain values."""
    slo = row.case.slo()
    return {
        "case": row.case.name,
        "held_back": row.case.held_back,
        "limits": {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s},
        "requests": row.case.requests,
        "bound": row.case.bound,
        "best": row.best.arrangement,
        "ratio": row.ratio,
        "of_bound": row.of_bound,
        "worst_quartile": row.worst_quartile,
        "p99_ttft_ratio": row.tail,
        "arrangements": [asdict(each) for each in (*row.fixed, row.auto)],
    }
