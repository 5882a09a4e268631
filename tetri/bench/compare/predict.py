"""What the simulator says about the same requests: the arrangement's times, with the cost table of this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tetri.bench.compare.arrangements import ROUND_ROBIN, Arrangement
from tetri.bench.compare.load import Answer
from tetri.bench.compare.store import Table
from tetri.bench.simulated import setup_of
from tetri.config import Config
from tetri.cost import Cost
from tetri.policy.coupled import CoupledLimits
from tetri.request import Slo
from tetri.sim import coupled
from tetri.sim.traces import Arrival
from tetri.sim.world import World

SLOTS, STEP_TOKENS = 128, 2048  # vLLM's defaults of a server on CPUs: running requests, and tokens of a step
GPU_SLOTS = 256
Times = tuple[float | None, float | None]  # TTFT and JCT, None: not served


def predicted(
    arrangement: Arrangement, config: Config, table: Table, answers: Sequence[Answer], slo: Slo
) -> list[Answer]:
    """The answers as the simulator times them, if the requests are sent when they were; one that it does not serve has
    an error. `config` has the arrangement's roles; `table` is that of an instance or server. Raises SimError and
    ValueError."""
    sent = sorted(answers, key=lambda each: each.sent_s)
    arrivals = [Arrival(each.sent_s, each.prompt, each.output) for each in sent]
    cost, delay_s = table.cost, table.delay_s
    times = _tetri(config, cost, arrivals, slo) if arrangement.is_tetri else _vllm(arrangement, config, cost, arrivals)
    return [
        Answer(each.at_s, ttft_s + delay_s, jct_s + delay_s, each.prompt, each.output)
        if ttft_s is not None and jct_s is not None
        else Answer(each.at_s, 0.0, 0.0, each.prompt, each.output, error="not served")
        for each, (ttft_s, jct_s) in zip(arrivals, times, strict=True)
    ]


def _tetri(config: Config, cost: Cost, arrivals: Sequence[Arrival], slo: Slo) -> list[Times]:
    outcomes = World(replace(setup_of(config, cost), slo=slo), arrivals).run().outcomes
    return [(each.ttft_s, each.jct_s) for each in outcomes]


def _vllm(arrangement: Arrangement, config: Config, cost: Cost, arrivals: Sequence[Arrival]) -> list[Times]:
    slots = GPU_SLOTS if config.workers[0].gpu >= 0 else SLOTS
    limits = CoupledLimits(slots, arrangement.chunk or STEP_TOKENS, cost.kv_tokens)
    route = coupled.round_robin() if arrangement.routing == ROUND_ROBIN else coupled.fewest_open
    served = coupled.run("chunked", limits, cost, arrivals, arrangement.servers, route=route).served
    return [(each.ttft_s, each.jct_s) for each in served]
