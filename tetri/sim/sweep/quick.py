"""Runs without the live cores: the coupled arrangements, and an estimate of a split.

The estimate (`tandem`) is a pool of prefill replicas that hands over to a pool of decode replicas. It takes a tenth of
the time of the live cores, and is meant to be optimistic: each decode goes where the fewest are, and no load is out of
date. A split that it rules out needs no run of the cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tetri import cost as costs
from tetri.policy.coupled import CoupledLimits
from tetri.sim import coupled
from tetri.sim.coupled import CoupledRequest, fewest_open
from tetri.sim.pools import WHOLE, least_queued
from tetri.sim.setup import Setup
from tetri.sim.sweep.arrangements import Arrangement
from tetri.sim.sweep.cases import Case
from tetri.sim.sweep.results import Served
from tetri.sim.traces import Arrival

SLOTS = 256  # requests that an instance decodes at once
LINK_BYTES_S = 25e9


def both_phases(case: Case, arrangement: Arrangement, rate: float) -> Served:
    """Serve the case with coupled instances."""
    cost, arrivals = costs.load(case.cost), [*case.arrivals(rate)]
    limits = CoupledLimits(SLOTS, arrangement.chunk, cost.kv_tokens)
    route = fewest_open if arrangement.kind == "coupled-ll" else coupled.round_robin()
    made = coupled.run("chunked", limits, cost, arrivals, case.instances, route=route)
    both_s = 2 * Setup(cost).link_latency_s  # from the client and back, as with the live cores
    return [
        (arrival, (each.ttft_s + both_s, (each.jct_s - each.ttft_s) / max(each.output - 1, 1), each.jct_s + both_s))
        for arrival, each in zip(arrivals, made.served, strict=True)
    ]


def tandem(case: Case, split: Arrangement, rate: float) -> Served:
    """Estimate the times of the case with a split."""
    cost, arrivals = costs.load(case.cost), [*case.arrivals(rate)]
    latency_s = Setup(cost).link_latency_s
    move_s = latency_s + split.chunk * cost.kv_token_bytes / LINK_BYTES_S
    limits = CoupledLimits(SLOTS, split.chunk, cost.kv_tokens)
    alone = (replace(arrival, output=1) for arrival in arrivals)
    prompts = coupled.run("chunked", limits, cost, alone, split.prefill, route=least_queued).served
    handed = sorted((each.end_s + move_s, number) for number, each in enumerate(prompts) if arrivals[number].output > 1)
    ends_s = {number: each.end_s for number, each in _decoded(case, split, arrivals, handed)}
    times = []
    for number, (arrival, each) in enumerate(zip(arrivals, prompts, strict=True)):
        end_s, more = ends_s.get(number, each.end_s), arrival.output - 1
        tpot_s = (end_s - each.end_s) / more if more else 0.0
        times.append((arrival, (each.ttft_s + 2 * latency_s, tpot_s, end_s - arrival.at_s + 2 * latency_s)))
    return times


def _decoded(
    case: Case, split: Arrangement, arrivals: Sequence[Arrival], handed: Sequence[tuple[float, int]]
) -> list[tuple[int, CoupledRequest]]:
    """The requests on the decode instances, each with its number. They enter at the end of a step."""
    cost = costs.load(case.cost)
    entry = replace(cost, prefill=((1.0, cost.decode_s(1, 0)),), prefill_start_s=0.0)
    entries = (Arrival(at_s, arrivals[number].prompt + 1, arrivals[number].output - 1) for at_s, number in handed)
    limits = CoupledLimits(min(SLOTS, split.chunk - 1), WHOLE, cost.kv_tokens)
    made = coupled.run("chunked", limits, entry, entries, split.decode, route=fewest_open)
    return [(number, each) for (_, number), each in zip(handed, made.served, strict=True)]
