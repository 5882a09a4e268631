"""The tables in which the configuration's policy names are looked up. A new policy is one function and one line
here (and one test)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from tetri.leg import Span
from tetri.policy import admit, chunk, order, route
from tetri.policy.views import BatchView, DecodeView, PrefillView, Progress, QueuedPrompt, WaitingSeat

PREFILL_ROUTES: dict[str, Callable[[Sequence[PrefillView]], str | None]] = {
    "least_loaded": route.least_loaded
}
DECODE_ROUTES: dict[str, Callable[[int, Sequence[DecodeView], Random], str | None]] = {
    "first_fit": route.first_fit
}
ORDERS: dict[str, Callable[[Sequence[QueuedPrompt]], list[str]]] = {
    "fcfs": order.fcfs,
    "sjf": order.sjf,
    "ljf": order.ljf,
}
CHUNKS: dict[str, Callable[[Sequence[Progress], int], list[Span]]] = {"pack": chunk.pack}
ADMISSIONS: dict[str, Callable[[Sequence[WaitingSeat], BatchView], list[str]]] = {"greedy": admit.greedy}

#: setting in [policy] -> its table
TABLES: dict[str, dict[str, Any]] = {
    "prefill_route": PREFILL_ROUTES,
    "decode_route": DECODE_ROUTES,
    "order": ORDERS,
    "chunk": CHUNKS,
    "admit": ADMISSIONS,
}


@dataclass(frozen=True, slots=True)
class Rules:
    """The policies that one cluster runs, by name."""

    prefill_route: str = "least_loaded"
    decode_route: str = "first_fit"
    order: str = "fcfs"
    chunk: str = "pack"
    admit: str = "greedy"
