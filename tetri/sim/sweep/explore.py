"""Find the goodput of every arrangement that can be the best of a case, with as few runs as possible.

Arrangements are tried in an order that brings good ones early. One that fails at 1 % more than the goodput of the best
so far is not the best, by more than the noise of a run. A split needs no run of the live cores if its fluid bound, or
an estimate that is optimistic, is below that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from time import process_time

from tetri.sim.kernel import uncollected
from tetri.sim.sweep.arrangements import AUTO, Arrangement, fixed
from tetri.sim.sweep.cases import SHIFT, Case
from tetri.sim.sweep.evaluate import evaluate
from tetri.sim.sweep.results import Result
from tetri.sim.sweep.search import GOAL, LEAST, Point, goodput, next_rate, on_ladder, slope
from tetri.sim.sweep.store import Store

FIRST = 0.75  # of the fluid bound: the first rate that is tried
MARGIN = 1.01
TRUST = 0.98  # a split whose estimate fails at this times the best goodput is not the best
OPTIMISM = 0.97  # a split with the live cores reaches about this times its estimate
SHARE = 0.85  # of its bound: the first rate of an estimate
KINDS = ("coupled-ll", "coupled-rr", "split")
CHUNKS = (512, 256, 2048)  # in the order in which they are tried


@dataclass(frozen=True, slots=True)
class Standing:
    """An arrangement in a case. `goodput`: requests a second; None if it is not the best, and `why` has the reason.
    `near`: the run next to the goodput that kept it. `beside`: of auto, the run at the rate of that of the best fixed
    arrangement."""

    arrangement: str
    goodput: float | None
    why: str = ""
    near: Result | None = None
    beside: Result | None = None


class Explorer:
    """Explores one case. Runs are taken from the store where it has them, and added to it where not."""

    def __init__(self, case: Case, store: Store) -> None:
        self.case, self.store = case, store

    def fixed(self) -> list[Standing]:
        """The fixed arrangements. Of a load that shifts, the best split is found too."""
        arrangements = sorted(fixed(self.case.instances), key=lambda each: (KINDS.index(each.kind), _place(each)))
        splits = [each for each in arrangements if each.kind == "split"]
        coupled, rival = self._coupled([each for each in arrangements if each.kind != "split"])
        return coupled + self._splits(splits, 0.0 if self.case.workload == SHIFT else rival)

    def automatic(self, start: float, rival: Result | None = None) -> Standing:
        """The arrangement auto, whose goodput may be near `start`. `rival`: a run to compare it with, at its rate."""
        auto = Arrangement(AUTO)
        if rival is not None and rival.rate not in self._rates(auto):
            self._run(auto, rival.rate, 0.0)
        found = self._found(auto, start)
        return found if rival is None else replace(found, beside=self._near(auto, rival.rate))

    # ------------------------------------------------------------ groups

    def _coupled(self, arrangements: Iterable[Arrangement]) -> tuple[list[Standing], float]:
        """The arrangements, and the goodput of the best."""
        made, best = [], 0.0
        for arrangement in arrangements:
            standing = self._against(arrangement, best)
            best = max(best, standing.goodput or 0.0)
            made.append(standing)
        return made, best

    def _splits(self, splits: Sequence[Arrangement], best: float) -> list[Standing]:
        """Rule splits out by their bounds and estimates, and run that with the best estimate."""
        out: list[Standing] = []
        estimates: dict[Arrangement, float] = {}
        bounds = {split: self.case.split_bound(split.prefill, split.decode, split.chunk) for split in splits}
        hoped = best * TRUST
        for split in sorted(splits, key=bounds.__getitem__, reverse=True):
            if bounds[split] <= hoped:
                out.append(Standing(split.name, None, f"not the best: its fluid bound is {bounds[split]:.4g}/s"))
                continue
            estimate = self._against(split.estimate, hoped, SHARE * bounds[split])
            if estimate.goodput is None:
                out.append(Standing(split.name, None, estimate.why.replace("fails", "its estimate fails")))
            else:
                estimates[split] = estimate.goodput
                hoped = max(hoped, estimate.goodput)
        ordered = sorted(estimates, key=estimates.__getitem__, reverse=True)
        for split in ordered[1:]:
            why = f"not the best: its estimate is {estimates[split]:.4g}/s, less than that of {ordered[0].name}"
            out.append(Standing(split.name, None, why))
        return out + [self._against(split, best, OPTIMISM * estimates[split]) for split in ordered[:1]]

    # ------------------------------------------------------------ one arrangement

    def _against(self, arrangement: Arrangement, best: float, start: float = 0.0) -> Standing:
        """Find the goodput if it is above `best`."""
        if best:
            rate = on_ladder(best * MARGIN)
            points = self._points(arrangement)
            if not any(
                point.rate <= rate and not point.passes or point.rate >= rate and point.passes for point in points
            ):
                points = [self._run(arrangement, rate, GOAL)]
            failed = [point.rate for point in points if point.rate <= rate and not point.passes]
            if failed:
                return Standing(arrangement.name, None, f"not the best: fails at {min(failed):.4g}/s")
        return self._found(arrangement, start or FIRST * self.case.bound)

    def _found(self, arrangement: Arrangement, start: float) -> Standing:
        sharpness = slope(self.case.instances)
        while (rate := next_rate(self._points(arrangement), start, sharpness)) is not None:
            self._run(arrangement, rate, LEAST)
        rate = goodput(self._points(arrangement), sharpness)
        return Standing(arrangement.name, rate, near=self._near(arrangement, rate))

    def _run(self, arrangement: Arrangement, rate: float, least: float) -> Point:
        started = process_time()
        with uncollected():
            result = evaluate(self.case, arrangement, rate, least)
        self.store.add(self.case, arrangement, result, process_time() - started)
        return self._point(result)

    def _points(self, arrangement: Arrangement) -> list[Point]:
        return [self._point(result) for result in self.store.known(self.case, arrangement)]

    def _rates(self, arrangement: Arrangement) -> list[float]:
        """The rates of the whole runs."""
        return [result.rate for result in self.store.known(self.case, arrangement) if not result.certain]

    def _point(self, result: Result) -> Point:
        return Point(result.rate, None if result.certain else result.attained[self.case.regime].share)

    def _near(self, arrangement: Arrangement, rate: float) -> Result | None:
        """The whole run next to a rate; if there are two, that below it."""
        whole = [result for result in self.store.known(self.case, arrangement) if not result.certain]
        return min(whole, key=lambda each: abs(each.rate / rate - 1) + 0.01 * (each.rate > rate), default=None)


def _place(arrangement: Arrangement) -> int:
    return CHUNKS.index(arrangement.chunk)


def best(standings: Iterable[Standing], kind: str = "") -> Standing:
    """The best of the arrangements whose names begin with `kind`."""
    found = [each for each in standings if each.goodput is not None and each.arrangement.startswith(kind)]
    return max(found, key=lambda each: each.goodput or 0.0)
