"""Serve the requests of a case with an arrangement at a rate, and measure them.

result = evaluate(case, named("auto", case.instances), rate=3.0)
result.attained["balanced"].share
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from tetri import cost as costs
from tetri.metrics import summarise
from tetri.policy.coupled import CoupledLimits
from tetri.policy.rules import Rules
from tetri.request import Slo
from tetri.sim import coupled
from tetri.sim.clients import Outcome
from tetri.sim.coupled import Replica, fewest_open
from tetri.sim.setup import Setup
from tetri.sim.sweep.arrangements import AUTO, Arrangement
from tetri.sim.sweep.cases import REGIMES, Case
from tetri.sim.traces import Arrival
from tetri.sim.world import World

SLOTS = 256  # requests that an instance decodes at once
LINK_BYTES_S = 25e9
LOAD_S = 0.25  # between two load reports, more than live: they are a third of the events
RULES = Rules()
LOOKS = 64  # times in a run that it is asked whether its result is certain
QUARTILES = 4
Times = tuple[float, float, float]  # seconds: TTFT, TPOT (0 without a second token), JCT


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


def evaluate(case: Case, arrangement: Arrangement, rate: float, least: float = 0.0) -> Result:
    """Serve the case at `rate` requests a second. Stops as soon as it is certain that less than `least` of the
    requests keep their limits, in any regime. Raises SimError."""
    regimes = [case.regime] if arrangement.kind == AUTO else [*REGIMES]
    slos = {regime: case.slo(regime) for regime in regimes}
    if arrangement.coupled:
        return _result(case, rate, _coupled(case, arrangement, rate), slos, certain=False)
    stopper = _Stopper(case, [*slos.values()], least)
    world = World(_setup(case, arrangement), case.arrivals(rate), stopper.look)
    stopper.world = world
    outcomes = world.run().outcomes
    served = [(outcome.arrival, _times(outcome)) for outcome in outcomes]
    return _result(case, rate, served, slos, stopper.failed)


# ---------------------------------------------------------------- runs

Served = Sequence[tuple[Arrival, Times | None]]  # None: it has not ended


def _coupled(case: Case, arrangement: Arrangement, rate: float) -> Served:
    cost = costs.load(case.cost)
    limits = CoupledLimits(SLOTS, arrangement.chunk, cost.kv_tokens)
    route = fewest_open if arrangement.kind == "coupled-ll" else _round_robin()
    arrivals = [*case.arrivals(rate)]
    made = coupled.run("chunked", limits, cost, arrivals, case.instances, route=route)
    both_s = 2 * Setup(cost).link_latency_s  # from the client and back, as the live cores have it
    return [
        (
            arrival,
            (each.ttft_s + both_s, (each.jct_s - each.ttft_s) / max(each.output - 1, 1), each.jct_s + both_s),
        )
        for arrival, each in zip(arrivals, made.served, strict=True)
    ]


def _round_robin() -> coupled.Routing:
    turn = -1

    def route(engines: Sequence[Replica], _: Arrival) -> int:
        nonlocal turn
        turn = (turn + 1) % len(engines)
        return turn

    return route


def _setup(case: Case, arrangement: Arrangement) -> Setup:
    cost = costs.load(case.cost)
    chunk = arrangement.chunk or cost.chunk_tokens
    setup = Setup(
        cost,
        prefill=arrangement.prefill,
        decode=arrangement.decode,
        rules=RULES,
        link_bytes_s=LINK_BYTES_S,
        chunk_tokens=chunk,
        max_batch=min(SLOTS, chunk - 1),
        load_s=LOAD_S,
        stale_s=10 * LOAD_S,
    )
    return replace(setup, auto=case.instances) if arrangement.kind == AUTO else setup


def _times(outcome: Outcome) -> Times | None:
    """None for a request that has not ended, or was not served."""
    if outcome.state != "done" or outcome.ttft_s is None or outcome.jct_s is None:
        return None
    return outcome.ttft_s, outcome.tpot_s or 0.0, outcome.jct_s


class _Stopper:
    """Stops a run whose result is certain: too many requests are late, or every one that counts has ended."""

    def __init__(self, case: Case, slos: Sequence[Slo], least: float) -> None:
        self.slos, self.least = slos, least
        self.first, self.last = case.counted(case.requests)
        self.every = max(case.requests // LOOKS, 1)
        self.failed = False
        self.world: World | None = None

    def look(self, answered: int) -> None:
        """Called with the number of requests that have ended."""
        world = self.world
        if world is None or answered % self.every:
            return
        outcomes, size = world.clients.outcomes[self.first : self.last], self.last - self.first
        late = [sum(map(partial(self._late, slo, world.kernel.now), outcomes)) for slo in self.slos]
        self.failed = all(size - each < self.least * size for each in late)
        ended = len(outcomes) == size and all(outcome.state != "open" for outcome in outcomes)
        if self.failed or ended:
            world.stop()

    @staticmethod
    def _late(slo: Slo, now: float, outcome: Outcome) -> bool:
        """Whether it misses a limit, also if it has not ended."""
        times = _times(outcome)
        if times is not None:
            return not _keeps(times, slo)
        age_s, more = now - outcome.arrival.at_s, outcome.arrival.output - 1
        return outcome.state != "open" or age_s > (slo.ttft_s or 0.0) + more * (slo.tpot_s or 0.0)


# ---------------------------------------------------------------- results


def _keeps(times: Times | None, slo: Slo) -> bool:
    return times is not None and times[0] <= (slo.ttft_s or 0.0) and times[1] <= (slo.tpot_s or 0.0)


def _result(case: Case, rate: float, served: Served, slos: Mapping[str, Slo], certain: bool) -> Result:
    first, last = case.counted(case.requests)
    some = sorted(served[first:last], key=lambda each: each[0].prompt + each[0].output)
    attained = {regime: _attainment(some, slo, last - first) for regime, slo in slos.items()}
    times = [each for _, each in some if each is not None]
    if certain or not times:
        return Result(rate, attained, None, None, None, certain)
    ttft, tpot, jct = (_spread(values) for values in zip(*times, strict=True))
    return Result(rate, attained, ttft, tpot, jct)


def _attainment(some: Served, slo: Slo, size: int) -> Attainment:
    kept = [_keeps(times, slo) for _, times in some]
    borders = [len(kept) * part // QUARTILES for part in range(QUARTILES + 1)]
    parts = [kept[start:stop] for start, stop in zip(borders, borders[1:], strict=False)]
    return Attainment(sum(kept) / size, tuple(sum(part) / max(len(part), 1) for part in parts))


def _spread(values: Sequence[float]) -> Spread:
    made = summarise(values)
    return Spread(made.mean, made.p50, made.p90, made.p99)
