"""The tables in which the configuration's policy names are looked up. A new policy is one function and one line
here (and one test): docs/policies.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from tetri.engine_request import Span
from tetri.policy import admit, chunk, dispatch, flip, length, order, route
from tetri.policy.length import LengthSettings
from tetri.policy.order import Order
from tetri.policy.views import (
    BatchView,
    DecodePool,
    FlipSettings,
    InstanceState,
    Need,
    PrefillPool,
    Progress,
    RoleChange,
    WaitingRequest,
)
from tetri.request import LengthRange, Sampling

PrefillRoute = Callable[[float, PrefillPool, Random], int | None]
DecodeRoute = Callable[[Need, DecodePool, Random], int | None]
ChunkPacking = Callable[[Sequence[Progress], int], list[Span]]
Admission = Callable[[Sequence[WaitingRequest], BatchView], list[str]]
LengthPrediction = Callable[[int, Sampling, LengthSettings, Random], LengthRange | None]
FlipRule = Callable[[Sequence[InstanceState], FlipSettings], RoleChange | None]

PREFILL_ROUTES: dict[str, PrefillRoute] = {
    "least_loaded": route.least_loaded,
    "random": route.random,
    "round_robin": route.round_robin,
}
DECODE_ROUTES: dict[str, DecodeRoute] = {
    "power_of_two": dispatch.power_of_two,
    "power_of_two_ratio": dispatch.power_of_two_ratio,
    "random": dispatch.random,
    "round_robin": dispatch.round_robin,
    "least_loaded": dispatch.least_loaded,
    "imbalance": dispatch.imbalance,
    "first_fit": dispatch.first_fit,
}
ORDERS: dict[str, Order] = {
    "fcfs": Order(order.fcfs, windowed=True),
    "sjf": Order(order.sjf, windowed=True),
    "ljf": Order(order.ljf, windowed=True),
    "ageing": Order(order.ageing, windowed=False),
    "deadline": Order(order.deadline, windowed=False),
}
CHUNKS: dict[str, ChunkPacking] = {"pack": chunk.pack}
ADMISSIONS: dict[str, Admission] = {
    "greedy": admit.greedy,
    "reserve_static": admit.reserve_static,
    "reserve_dynamic": admit.reserve_dynamic,
    "peak": admit.peak,
}
#: admission policy -> blocks that no new request may be granted, since the running ones will take them; others: none
KEPT_FREE: dict[str, Callable[[BatchView], int]] = {"peak": admit.growth_to_peak}
LENGTHS: dict[str, LengthPrediction] = {
    "none": length.none,
    "oracle": length.oracle,
    "noisy": length.noisy,
    "trained": length.trained,
}
FLIPS: dict[str, FlipRule] = {"none": flip.none, "idle": flip.idle, "below": flip.below, "balance": flip.balance}

#: setting in [policy], or `flip` in [monitor] -> its table
TABLES: dict[str, Mapping[str, Any]] = {
    "prefill_route": PREFILL_ROUTES,
    "decode_route": DECODE_ROUTES,
    "order": ORDERS,
    "chunk": CHUNKS,
    "admit": ADMISSIONS,
    "length": LENGTHS,
    "flip": FLIPS,
}


@dataclass(frozen=True, slots=True)
class Rules:
    """The policies that one cluster runs, by name, and their settings.

    sched_batch         prompts that are ordered together (paper, section 3.3.1: PrefillSchedBatch)
    dispatch_end        end of the predicted range that the dispatcher reckons with: low, middle or high
    admit_end           the same for decode admission (the paper: low)
    heavy_tokens        a decode that is predicted to write more than so many tokens is heavy (paper, section 5.1)
    length_granularity  tokens of one predicted range
    length_accuracy     of `noisy`: how often its range is the right one
    length_cover        of `trained`: the share of requests that are to end below the high end of their range; 0: the
                        range is the likeliest bucket
    length_wait_s       seconds that a started prompt waits for the prediction of its length, and all behind it, at most
                        and never past its last chunk
    stretch             of `ageing`: seconds of waiting that weigh as much as one second of work
    """

    prefill_route: str = "least_loaded"
    decode_route: str = "power_of_two"
    order: str = "fcfs"
    chunk: str = "pack"
    admit: str = "greedy"
    length: str = "none"
    sched_batch: int = 16
    dispatch_end: str = "high"
    admit_end: str = "high"
    heavy_tokens: int = 128
    length_granularity: int = 200
    length_accuracy: float = 0.749
    length_cover: float = 0.0
    length_wait_s: float = 0.25
    stretch: float = 4.0
