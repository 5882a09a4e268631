"""The tables that map policy names of the configuration to functions, and the settings of all policies. A new policy is
one function, one line here and one test: docs/policies.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from tetri.engine_request import Span
from tetri.policy import admit, chunk, dispatch, flip, length, migrate, order, route
from tetri.policy.length import LengthSettings
from tetri.policy.order import Order
from tetri.policy.views import (
    BatchView,
    DecodeInstance,
    DecodePool,
    FlipSettings,
    InstanceState,
    Need,
    PrefillPool,
    Progress,
    RoleChange,
    RunningDecode,
    WaitingRequest,
)
from tetri.request import LengthRange, Sampling

PrefillRoute = Callable[[float, PrefillPool, Random], int | None]
DecodeRoute = Callable[[Need, DecodePool, Random], int | None]
ChunkPacking = Callable[[Sequence[Progress], int], list[Span]]
Admission = Callable[[Sequence[WaitingRequest], BatchView], list[str]]
LengthPrediction = Callable[[int, Sampling, LengthSettings, Random], LengthRange | None]
Migration = Callable[[Sequence[DecodeInstance], Mapping[str, Sequence[RunningDecode]]], list[tuple[str, str]]]
FlipRule = Callable[[Sequence[InstanceState], FlipSettings], RoleChange | None]

PREFILL_ROUTES: dict[str, PrefillRoute] = {
    "least_loaded": route.least_loaded,
    "adaptive": route.adaptive,
    "random": route.random,
    "round_robin": route.round_robin,
}
DECODE_ROUTES: dict[str, DecodeRoute] = {
    "power_of_two": dispatch.power_of_two,
    "adaptive": dispatch.adaptive,
    "power_of_two_ratio": dispatch.power_of_two_ratio,
    "random": dispatch.random,
    "round_robin": dispatch.round_robin,
    "least_loaded": dispatch.least_loaded,
    "imbalance": dispatch.imbalance,
    "first_fit": dispatch.first_fit,
}
ORDERS: dict[str, Order] = {
    "adaptive": Order(order.adaptive, windowed=False),  # but see order_of
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
#: admission policy -> blocks to keep free of new grants, since running requests will need them. Without an entry:
#: `admit.next_growth`
KEPT_FREE: dict[str, Callable[[BatchView], int]] = {"peak": admit.growth_to_peak}
LENGTHS: dict[str, LengthPrediction] = {
    "none": length.none,
    "oracle": length.oracle,
    "noisy": length.noisy,
    "trained": length.trained,
}
MIGRATIONS: dict[str, Migration] = {"none": migrate.none, "auto": migrate.auto, "everywhere": migrate.everywhere}
FLIPS: dict[str, FlipRule] = {"none": flip.none, "idle": flip.idle, "below": flip.below, "balance": flip.balance}

#: name of the setting in [policy], or `flip` in [monitor] -> its table
TABLES: dict[str, Mapping[str, Any]] = {
    "prefill_route": PREFILL_ROUTES,
    "decode_route": DECODE_ROUTES,
    "order": ORDERS,
    "chunk": CHUNKS,
    "admit": ADMISSIONS,
    "length": LENGTHS,
    "migrate": MIGRATIONS,
    "flip": FLIPS,
}


@dataclass(frozen=True, slots=True)
class Rules:
    """The names of the policies that a cluster uses, and their settings.

    sched_batch         prompts that are ordered together (paper, section 3.3.1: PrefillSchedBatch)
    dispatch_end        end of the length range that the dispatcher uses: low, middle or high
    admit_end           end of the length range that decode admission uses (the paper: low)
    heavy_tokens        a decode predicted to write more tokens than this is heavy (paper, section 5.1)
    length_granularity  tokens of one bucket
    length_accuracy     of `noisy`: probability that it names the right bucket
    length_cover        of `trained`: share of requests that should end below the high end of their range; 0: the range
                        is the likeliest bucket
    length_wait_s       most seconds that a started prompt, and those behind it, wait for its length prediction; the
                        wait never extends past its last chunk
    stretch             of `ageing`: seconds of waiting that equal one second of work
    """

    prefill_route: str = "adaptive"
    decode_route: str = "adaptive"
    order: str = "adaptive"
    chunk: str = "pack"
    admit: str = "greedy"
    length: str = "none"
    migrate: str = "auto"
    sched_batch: int = 16
    dispatch_end: str = "high"
    admit_end: str = "high"
    heavy_tokens: int = 128
    length_granularity: int = 200
    length_accuracy: float = 0.749
    length_cover: float = 0.0
    length_wait_s: float = 0.25
    stretch: float = 4.0


def order_of(name: str, role: str) -> Order:
    """The order of an instance that starts in this role."""
    return ORDERS["fcfs" if name == "adaptive" and role != "auto" else name]
