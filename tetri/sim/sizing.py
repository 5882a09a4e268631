"""How many instances reach limits of TTFT and TPOT at a rate of requests.

    sizing = size(Demand(Goal(rate=5, ttft_s=2, tpot_s=0.1), Setup(cost.load("v100-opt13b")), lengths))

Each role is sized by itself, by its pool (`pools`); `checked` serves the demand with whole deployments of the live
cores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import floor, inf

from tetri.metrics import percentile
from tetri.sim.pools import MOST, TURNS, Demand, Goal, Served, counted, settled
from tetri.sim.setup import SimError
from tetri.sim.world import World


class SizingError(ValueError):
    """No number of instances reaches the limits; one line that says which limit, and what is the least."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The fewest instances that reach the goal, and what one fewer would do; None if there are none fewer. `bound`:
    what keeps an instance from more: compute (it would be busy all the time), ttft, tpot, kv_memory, max_batch or
    link."""

    enough: Served
    fewer: Served | None
    bound: str


@dataclass(frozen=True, slots=True)
class Sizing:
    """The answer for each role, and for coupled instances, which do the work of both: None if no number of
    them reaches the goal."""

    prefill: Answer
    decode: Answer
    coupled: Answer | None


def size(demand: Demand) -> Sizing:
    """Find the fewest instances of each role. Raises SizingError and SimError."""
    demand.setup.check()
    _check(demand)
    goal = demand.goal
    prefill = _least(goal, lambda count: settled(partial(demand.prefill, count)), demand.prefill_load)
    prompting = prefill[0].instances
    decode = _least(goal, lambda count: settled(partial(demand.decode, count, prompting)), demand.decode_load)
    return Sizing(
        Answer(*prefill, "compute" if prefill[1] is not None and prefill[1].ttft_s == inf else "ttft"),
        Answer(*decode, demand.decode_bound),
        _coupled(demand),
    )


def _coupled(demand: Demand) -> Answer | None:
    try:
        enough, fewer = _least(demand.goal, demand.coupled, demand.coupled_load)
    except SizingError:
        return None
    late = fewer is not None and (fewer.ttft_s or 0.0) > demand.goal.ttft_s
    return Answer(enough, fewer, "ttft" if late else "tpot")


def _check(demand: Demand) -> None:
    """Raises SizingError if one request by itself breaks a limit or does not fit."""
    goal, capacity = demand.goal, demand.capacity
    longest = max(prompt + output for prompt, output in demand.lengths)
    most = min(demand.kv_tokens, capacity.context)
    if longest > most:
        raise SizingError(f"a request of {longest} tokens is longer than the {most} that an instance holds")
    which = f"of {100 * goal.share:g} % of the requests" if len({*demand.lengths}) > 1 else "of a request"
    least_s = percentile([demand.prompt_s(prompt) for prompt, _ in demand.lengths], goal.share)
    if goal.ttft_s < least_s:
        raise SizingError(
            f"ttft {goal.ttft_s:g} s: the prefill {which} alone takes {least_s:.4g} s: give at least that"
        )
    tpots = [demand.least_tpot_s(prompt, output) for prompt, output in demand.lengths if output > 1]
    if tpots and goal.tpot_s < (least_s := percentile(tpots, goal.share)):
        raise SizingError(f"tpot {goal.tpot_s:g} s: a token {which} alone takes {least_s:.4g} s: give at least that")


def _least(goal: Goal, serve: Callable[[int], Served], load: float) -> tuple[Served, Served | None]:
    """The fewest instances that reach the goal, and one fewer. The search begins at `load`: in steps that double, up
    until some reach it, or down until some do not; then halve what is between."""
    tried: dict[int, Served] = {}

    def reaches(instances: int) -> bool:
        if instances > MOST:
            raise SizingError(f"more than {MOST} instances of a role are needed: give higher limits or a lower rate")
        if instances not in tried:
            tried[instances] = serve(instances)
        return tried[instances].reaches(goal)

    low, step = floor(load), 1
    high = low + 1
    while not reaches(high):
        low, high, step = high, high + step, 2 * step
    while low and reaches(low):
        low, high, step = max(low - step, 0), low, 2 * step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return tried[high], tried.get(low)


# ---------------------------------------------------------------- the live cores

SERVED = 3000  # requests of a simulated deployment


@dataclass(frozen=True, slots=True)
class Checked:
    """A simulated deployment. `expected`: whether the sizing says that it reaches the goal; `reached`: whether it does,
    and `sure` whether by more than chance. `ttft_s` and `tpot_s` are those at the goal's share."""

    prefill: int
    decode: int
    ttft_s: float
    tpot_s: float
    expected: bool
    reached: bool
    sure: bool


def checked(demand: Demand, sizing: Sizing, requests: int = SERVED) -> list[Checked]:
    """Serve the demand with the live cores: on the deployment of this sizing, on one with one prefill instance fewer,
    and on one with one decode instance fewer, at least so many `requests`, and more where that leaves it to chance. Its
    seed should not be that of the sizing. Raises SimError."""
    prefill, decode = sizing.prefill.enough.instances, sizing.decode.enough.instances
    turns = TURNS * round(decode * (sizing.decode.enough.batch or 0.0))
    tried = [(prefill, decode, True), (prefill - 1, decode, False), (prefill, decode - 1, False)]
    least = max(requests, turns)
    return [settled(partial(_simulated, demand, least, *each)) for each in tried if each[0] and each[1]]


def _simulated(demand: Demand, least: int, prefill: int, decode: int, expected: bool, times: int) -> Checked:
    goal = demand.goal
    setup = replace(demand.setup, prefill=prefill, decode=decode, mixed=0, seed=demand.seed)
    outcomes = counted(World(setup, demand.arrivals(goal.rate, times * least)).run().outcomes)
    lost = [outcome for outcome in outcomes if outcome.state != "done"]
    if lost:
        raise SimError(f"{len(lost)} requests were not served: {lost[0].why}")
    ttfts = [outcome.ttft_s or 0.0 for outcome in outcomes]
    tpots = [outcome.tpot_s or 0.0 for outcome in outcomes if outcome.arrival.output > 1] or [0.0]
    ttft_s, tpot_s = percentile(ttfts, goal.share), percentile(tpots, goal.share)
    reached = Served(prefill + decode, ttft_s, tpot_s).reaches(goal)
    return Checked(prefill, decode, ttft_s, tpot_s, expected, reached, demand.sure(ttfts, tpots))
