"""The cases of the sweep: workload, hardware, number of instances and limits of latency.

A case is named workload/cost/instances/regime, as in Mixed/cpu-smollm2/4/balanced. The cases that differ only in the
regime have the same requests. At any rate, a workload has the same requests in the same order, at times that are
divided by the rate: arrangements are compared on the same draw.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from itertools import accumulate
from math import fsum
from pathlib import Path
from random import Random

from tetri import cost as costs
from tetri.metrics import percentile
from tetri.request import Slo
from tetri.sim import workloads
from tetri.sim.pools import Lengths
from tetri.sim.sweep import fluid
from tetri.sim.traces import Arrival, replayed

#: regime -> limits, as multiples of the TTFT of the p90 prompt and of a decode step on an idle instance
REGIMES = {"tight-ttft": (3, 6), "balanced": (6, 3), "tight-tpot": (12, 2)}
COSTS = ("cpu-smollm2", "v100-opt13b")
INSTANCES = (2, 4, 8, 32)
CLASSES = ("LPLD", "LPHD", "HPLD", "HPHD", "Mixed")
SHIFT = "shift"
PHASES = ("LPHD", "HPLD", "LPHD")  # of the workload shift, which last equally long
PER_INSTANCE, LEAST = 1000, 4000  # requests of a run: so many for each instance, and not fewer than this
COUNTED = (0.2, 0.95)  # the requests that count, as shares of their number; of the workload shift all count
SEED = 14


@dataclass(frozen=True, slots=True)
class Case:
    """One case. `trace`: the file of the workload; "": it is one of CLASSES or SHIFT. `size`: requests of a run; 0: as
    many as tell arrangements apart."""

    workload: str
    cost: str
    instances: int
    regime: str
    trace: str = ""
    size: int = 0

    @property
    def cell(self) -> str:
        """The name without the regime: what the requests and a fixed arrangement depend on."""
        return f"{self.workload}/{self.cost}/{self.instances}"

    @property
    def name(self) -> str:
        """The name of the case."""
        return f"{self.cell}/{self.regime}"

    @property
    def held_back(self) -> bool:
        """Whether this case is one of the third that judges the final policy."""
        return int.from_bytes(sha256(self.name.encode()).digest()[:4]) % 3 == 0

    def slo(self, regime: str = "") -> Slo:
        """The limits of this regime, by default the case's."""
        ttft, tpot = REGIMES[regime or self.regime]
        ttft_s, step_s = _alone(self.workload, self.trace, self.cost)
        return Slo(ttft_s=ttft * ttft_s, tpot_s=tpot * step_s)

    @property
    def bound(self) -> float:
        """Requests a second that no arrangement exceeds (see `fluid`)."""
        tpot_s = self.slo().tpot_s or 0.0
        return _bound(self.workload, self.trace, self.cost, tpot_s) * self.instances

    def split_bound(self, prefill: int, decode: int, chunk: int) -> float:
        """Requests a second that a split does not exceed."""
        lengths = _sample(self.workload, self.trace, self.cost)
        return fluid.split_bound(costs.load(self.cost), lengths, self.slo().tpot_s or 0.0, prefill, decode, chunk)

    @property
    def requests(self) -> int:
        """Number of requests of a run."""
        return self.size or max(PER_INSTANCE * self.instances, LEAST)

    def arrivals(self, rate: float) -> Iterator[Arrival]:
        """The requests of a run, at `rate` requests a second on average."""
        drawn = _drawn(self.workload, self.trace, self.cost, self.requests)
        return (Arrival(at / rate, prompt, output) for at, prompt, output in drawn)

    @property
    def arrivals_digest(self) -> str:
        """A digest of the requests."""
        return _drawn_digest(self.workload, self.trace, self.cost, self.requests)

    def counted(self, requests: int) -> tuple[int, int]:
        """The first request that counts, and the one after the last. The start of a run does not count, nor does its
        end, where no more requests follow."""
        if self.workload == SHIFT:
            return 0, requests
        return int(COUNTED[0] * requests), int(COUNTED[1] * requests)


def cases(traces: Sequence[str | Path] = (), size: int = 0) -> list[Case]:
    """All cases; each trace is one more workload, with the name of its file. `size`: as in Case. Raises
    TraceError."""
    for trace in traces:
        _fitting(str(trace), COSTS[0])
    sources = [(name, "") for name in (*CLASSES, SHIFT)] + [(Path(trace).stem, str(trace)) for trace in traces]
    return [
        Case(workload, cost, instances, regime, trace, size)
        for instances in INSTANCES
        for cost in COSTS
        for workload, trace in sources
        for regime in REGIMES
    ]


Timed = tuple[float, int, int]  # arrival at a rate of 1 a second, prompt tokens, output tokens


@cache
def _drawn(workload: str, trace: str, cost: str, requests: int) -> tuple[Timed, ...]:
    """The requests at a rate of 1 a second on average."""
    if trace:
        rows = _fitting(trace, cost)
        repeated = [rows[number % len(rows)] for number in range(requests)]
        whole_s = rows[-1][0] * len(rows) / (len(rows) - 1)
        starts = [number // len(rows) * whole_s for number in range(requests)]
        made = [(start + at, prompt, output) for start, (at, prompt, output) in zip(starts, repeated, strict=True)]
        mean_s = made[-1][0] / (requests - 1)
        return tuple((at / mean_s, prompt, output) for at, prompt, output in made)
    if workload == SHIFT:
        return tuple(_shifting(cost, requests))
    rng = Random(f"{workload} {SEED}")
    lengths = _lengths(workload, requests, SEED)
    return tuple((at, *each) for at, each in zip(_times(rng, requests), lengths, strict=True))


@cache
def _drawn_digest(workload: str, trace: str, cost: str, requests: int) -> str:
    return sha256(repr(_drawn(workload, trace, cost, requests)).encode()).hexdigest()[:12]


def _times(rng: Random, requests: int) -> Iterator[float]:
    """A Poisson process at exactly 1 request a second: a chance that changes the load would say more about the draw
    than about the arrangement."""
    gaps = [rng.expovariate(1.0) for _ in range(requests)]
    scale = requests / fsum(gaps)
    return accumulate(gap * scale for gap in gaps)


def _lengths(workload: str, requests: int, seed: int) -> Lengths:
    drawn = workloads.load().workloads[workload].draw(seed, requests)
    return [(each.prompt, each.output) for each in drawn]


def _shifting(cost: str, requests: int) -> Iterator[Timed]:
    """Phases that last equally long and load the instances equally: the rate of each is proportional to its bound."""
    rates = [_bound(name, "", cost, REGIMES["balanced"][1] * _alone(name, "", cost)[1]) for name in PHASES]
    sizes = [round(requests * rate / fsum(rates)) for rate in rates[:-1]]
    sizes.append(requests - sum(sizes))
    phase_s = requests / len(PHASES)
    rng = Random(f"{SHIFT} {SEED}")
    for number, (name, size) in enumerate(zip(PHASES, sizes, strict=True)):
        lengths = _lengths(name, size, SEED + number)
        for at, (prompt, output) in zip(_times(rng, size), lengths, strict=True):
            yield (number + at / size) * phase_s, prompt, output


@cache
def _fitting(trace: str, cost: str) -> tuple[Timed, ...]:
    """The rows of a trace that fit into the KV of an instance."""
    most = costs.load(cost).kv_tokens
    rows = replayed(trace).arrivals
    return tuple((row.at_s, row.prompt, row.output) for row in rows if row.prompt + row.output <= most)


@cache
def _sample(workload: str, trace: str, cost: str) -> Lengths:
    return [(prompt, output) for _, prompt, output in _drawn(workload, trace, cost, LEAST)]


@cache
def _alone(workload: str, trace: str, cost: str) -> tuple[float, float]:
    """Seconds to the first token of the p90 prompt, and of one of its decode steps, on an idle instance."""
    table = costs.load(cost)
    p90 = round(percentile([prompt for prompt, _ in _sample(workload, trace, cost)], 0.9))
    return table.prompt_s(p90, 0, table.chunk_tokens), table.decode_s(1, p90)


@cache
def _bound(workload: str, trace: str, cost: str, tpot_s: float) -> float:
    return fluid.bound(costs.load(cost), _sample(workload, trace, cost), tpot_s, 1)
