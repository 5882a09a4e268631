"""The settings of a simulation: instances, policies, hardware, links. Errors are one line that says what is allowed."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import inf, isfinite

from tetri.cost import Cost
from tetri.instance import Capacity
from tetri.policy.rules import FLIPS, TABLES, Rules
from tetri.policy.views import FlipSettings
from tetri.request import Expected, Slo, blocks_for, slo_problem

UNBOUNDED = 1 << 40  # for limits of a live deployment that are not simulated


class SimError(ValueError):
    """The simulation cannot run, or a promise was broken; one line with the reason."""


class PromiseBroken(SimError):
    """The cores violated a guarantee."""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Timeouts in seconds. The defaults are those of a live deployment, except `max_attempts` and `max_deaths`: faults
    that come often must end no request.

    dead_s          a silent worker: the broker restarts its requests
    gone_s          a silent worker: the monitor removes it from the view
    offer_s         an offer without an answer: it is sent again
    view_s          a silent broker: the worker registers again
    patience_s      no instance for a request: it fails
    client_grace_s  an unreachable client: its request is cancelled
    quiet_s         a client that was sent nothing: it gets an empty Delta
    ask_s           a silent broker: the client asks again"""

    dead_s: float = 20.0
    gone_s: float = 20.0
    offer_s: float = 1.0
    view_s: float = 2.0
    patience_s: float = 60.0
    client_grace_s: float = 5.0
    quiet_s: float = 1.0
    ask_s: float = 1.0
    max_attempts: int = 1000
    max_deaths: int = 1000


@dataclass(frozen=True, slots=True)
class Setup:
    """The settings of one simulation; times in seconds, sizes in tokens or bytes. `kv_tokens` and `chunk_tokens` 0: as
    in the cost table. `slots` (of an instance's slab) and `context` 0: as many as the instance's KV holds.

    transfer         "chunk": KV is sent after each chunk; "request": after the whole prefill (paper, section 3.3.4)
    stream_interval  tokens between two messages with output tokens; the first and the last token are sent at once
    stall_s          the longest time in which no engine may compute while requests are open
    warm_s           how long before time 0 the processes start, so that they are connected when requests arrive
    timeouts         only with faults; without faults nothing times out
    kv_paths         only with faults: each worker draws one of these sets of KV paths when it starts
    slo              limits of latency of requests that name none; None: those that the broker finds
    limit_s          only with faults: everything must be over this long after the last fault
    expected         what the workers know about lengths before any traffic, for the length policy `trained`"""

    cost: Cost
    prefill: int = 1
    decode: int = 1
    mixed: int = 0
    auto: int = 0
    rules: Rules = Rules()
    slo: Slo = Slo()
    expected: Expected | None = None
    link_bytes_s: float = inf
    link_latency_s: float = 0.0005
    transfer: str = "chunk"
    kv_tokens: int = 0
    block_tokens: int = 16
    chunk_tokens: int = 0
    max_batch: int = 256
    context: int = 0
    slots: int = 0
    reserve_share: float = 0.5
    seed: int = 0
    flip: str = "none"
    flip_settings: FlipSettings = FlipSettings()
    load_s: float = 0.1
    stale_s: float = 1.0
    heartbeat_s: float = 5.0
    stream_interval: int = 1 << 20
    stall_s: float = 600.0
    warm_s: float = 1.0
    timeouts: Timeouts = Timeouts()
    kv_paths: tuple[tuple[str, ...], ...] = (("stream",),)
    limit_s: float = inf
    spans: bool = False  # record the busy intervals of every instance
    timelines: bool = False  # trace requests as live, for who looks into a simulation; with faults always

    def capacity(self) -> Capacity:
        """Return the capacity of each instance. Raises SimError if the KV holds no block."""
        tokens = self.kv_tokens or self.cost.kv_tokens
        blocks = tokens // self.block_tokens
        if blocks < 1:
            raise SimError(f"the KV of an instance holds {tokens} tokens: give kv_tokens, at least {self.block_tokens}")
        return Capacity(
            blocks=blocks,
            block_tokens=self.block_tokens,
            chunk_tokens=self.chunk_tokens or self.cost.chunk_tokens or 512,
            max_batch=self.max_batch,
            context=self.context or blocks * self.block_tokens,
        )

    def check(self) -> None:
        """Check all values. Raises SimError, which says what is allowed."""
        problem = _problem(self)
        if problem is not None:
            raise SimError(problem)


def _problem(setup: Setup) -> str | None:
    for name, least in _LEAST.items():
        value = getattr(setup, name)
        if not value >= least or (not isfinite(value) and name != "link_bytes_s"):
            return f"{name} must be at least {least:g}, got {value:g}"
    if not setup.limit_s > 0:
        return f"limit_s must be above 0, got {setup.limit_s:g}"
    if not setup.link_bytes_s > 0:
        return f"link_bytes_s must be above 0, got {setup.link_bytes_s:g}"
    for role in ("prefill", "decode"):
        if not getattr(setup, role) + setup.mixed + setup.auto:
            return f"there is no {role} instance: give {role}, mixed or auto at least 1"
    capacity = setup.capacity()
    if capacity.max_batch >= capacity.chunk_tokens:
        return f"max_batch must be below chunk_tokens ({capacity.chunk_tokens}): a step also needs tokens for prompts"
    if capacity.context > capacity.blocks * capacity.block_tokens:
        held = capacity.blocks * capacity.block_tokens
        return f"context must be at most {held}, the KV tokens of an instance, got {capacity.context}"
    least = blocks_for(capacity.chunk_tokens + capacity.block_tokens - 1, capacity.block_tokens)
    if 0 < setup.slots < least:
        return f"slots must be at least {least}, the blocks that one chunk may fill, got {setup.slots}"
    if not 0 < setup.reserve_share <= 1:
        return f"reserve_share must be above 0 and at most 1, got {setup.reserve_share:g}"
    if setup.transfer not in ("chunk", "request"):
        return f"unknown transfer {setup.transfer!r}; known: chunk, request"
    if setup.rules.length == "trained" and setup.expected is None:
        return "the length policy trained needs recorded predictions, as in tools/bench_prediction; else use noisy"
    if setup.flip not in FLIPS:
        return f"unknown flip {setup.flip!r}; known: {', '.join(FLIPS)}"
    return slo_problem(setup.slo) or rules_problem(setup.rules)


_LEAST: dict[str, float] = {
    **dict.fromkeys(("prefill", "decode", "mixed", "auto", "kv_tokens", "chunk_tokens", "context", "slots"), 0),
    **dict.fromkeys(("link_latency_s", "warm_s"), 0),
    **dict.fromkeys(("block_tokens", "max_batch", "stream_interval"), 1),
    **dict.fromkeys(("load_s", "stale_s", "heartbeat_s", "stall_s"), 0.001),
}


def rules_problem(rules: Rules) -> str | None:
    """Return one line about the first policy that does not exist; None if all exist."""
    for field in fields(rules):
        known = TABLES.get(field.name)
        value = getattr(rules, field.name)
        if known is not None and value not in known:
            return f"unknown {field.name} {value!r}; known: {', '.join(known)}"
    return None
