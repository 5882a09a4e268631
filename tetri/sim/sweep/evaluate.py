"""Serve the requests of a case with an arrangement at a rate, and measure them.

result = evaluate(case, named("auto", case.instances), rate=3.0)
result.attained[case.regime].share
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from tetri import cost as costs
from tetri.policy.rules import Rules
from tetri.request import Slo
from tetri.sim.clients import Outcome
from tetri.sim.setup import Setup
from tetri.sim.sweep.arrangements import AUTO, Arrangement
from tetri.sim.sweep.cases import REGIMES, Case
from tetri.sim.sweep.quick import LINK_BYTES_S, SLOTS, both_phases, tandem
from tetri.sim.sweep.results import Result, Served, Times, keeps, result_of
from tetri.sim.world import World

LOAD_S = 0.25  # between two load reports, more than live: they are a third of the events
RULES = Rules()
CHUNK_TOKENS = 512  # of auto instances: the default of engine.chunk_tokens
LOOKS = 64  # times in a run that it is asked whether its result is certain
#: kind of arrangement -> the run that does without the live cores
QUICK: dict[str, Callable[[Case, Arrangement, float], Served]] = {
    "coupled-ll": both_phases,
    "coupled-rr": both_phases,
    "tandem": tandem,
}


def evaluate(case: Case, arrangement: Arrangement, rate: float, least: float = 0.0) -> Result:
    """Serve the case at `rate` requests a second. Stops as soon as it is certain that less than `least` of the
    requests keep their limits, in any regime. Raises SimError."""
    regimes = [case.regime] if arrangement.kind == AUTO else [*REGIMES]
    slos = {regime: case.slo(regime) for regime in regimes}
    if arrangement.kind in QUICK:
        return result_of(case, rate, QUICK[arrangement.kind](case, arrangement, rate), slos)
    stopper = _Stopper(case, [*slos.values()], least)
    world = World(_setup(case, arrangement), case.arrivals(rate), lambda answered: stopper.look(world, answered))
    served = [(outcome.arrival, _times(outcome)) for outcome in world.run().outcomes]
    return result_of(case, rate, served, slos, stopper.failed)


def _setup(case: Case, arrangement: Arrangement) -> Setup:
    chunk = arrangement.chunk or CHUNK_TOKENS
    setup = Setup(
        costs.load(case.cost),
        prefill=arrangement.prefill,
        decode=arrangement.decode,
        rules=RULES,
        link_bytes_s=LINK_BYTES_S,
        chunk_tokens=chunk,
        max_batch=min(SLOTS, chunk - 1),
        load_s=LOAD_S,
        stale_s=10 * LOAD_S,
    )
    return replace(setup, auto=case.instances, slo=case.slo()) if arrangement.kind == AUTO else setup


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

    def look(self, world: World, answered: int) -> None:
        """Called with the number of requests that have ended."""
        if answered % self.every:
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
        if outcome.state != "open":
            return not keeps(_times(outcome), slo)
        age_s, more = now - outcome.arrival.at_s, outcome.arrival.output - 1
        return age_s > (slo.ttft_s or 0.0) + more * (slo.tpot_s or 0.0)
