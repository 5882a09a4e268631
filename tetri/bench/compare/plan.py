"""What a comparison runs, in which order, and how long what is left will take. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean

from tetri.bench.compare.arrangements import Arrangement

START_S = 60.0  # of a start, if none is known
ANY = ""  # the regime of a run whose servers know no limits: it counts for every regime


@dataclass(frozen=True, slots=True)
class Run:
    """One run. `rate`: as it was asked for: "1.2" (requests per second) or "70%" (of the capacity)."""

    arrangement: str
    workload: str
    rate: str
    regime: str
    repeat: int

    def same_requests(self, other: Run) -> bool:
        """Whether both send equal requests at equal rates, but for what differs between repeats."""
        return (self.workload, self.rate) == (other.workload, other.rate)

    def __str__(self) -> str:
        limits = f", {self.regime}" if self.regime else ""
        rate = self.rate if self.rate.endswith("%") else f"{self.rate}/s"
        return f"{self.arrangement}, {self.workload} at {rate}{limits}, repeat {self.repeat}"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to compare. `regimes`: names of limits."""

    arrangements: Sequence[Arrangement]
    workloads: Sequence[str]
    rates: Sequence[str]
    regimes: Sequence[str]
    repeats: int

    def runs(self) -> Iterator[Run]:
        """All runs in their order. An arrangement is started once a repeat, and serves everything then; the order of
        the arrangements alternates, so that a machine that becomes slower or faster favours none."""
        groups = [[*each] for _, each in groupby(self.arrangements, key=lambda each: each.deployment)]
        for repeat in range(1, self.repeats + 1):
            for group in groups if repeat % 2 else reversed(groups):
                for workload in self.workloads:
                    for rate in self.rates:
                        for arrangement in group:
                            for regime in self.regimes if arrangement.knows_limits else (ANY,):
                                yield Run(arrangement.name, workload, rate, regime, repeat)


def started_together(runs: Sequence[Run], known: Mapping[str, Arrangement]) -> list[list[Run]]:
    """The runs, in groups of those that follow each other on the same processes."""
    return [[*group] for _, group in groupby(runs, key=lambda run: (run.repeat, known[run.arrangement].deployment))]


def seconds_left(groups: Sequence[Sequence[Run]], run_s: Callable[[Run], float], start_s: Sequence[float]) -> float:
    """How long these groups will take. `run_s`: seconds of a run, as expected; `start_s`: of the starts so far."""
    start = fmean(start_s) if start_s else START_S
    return start * len(groups) + sum(run_s(run) for group in groups for run in group)
