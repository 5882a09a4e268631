"""Scheduling of a coupled engine, where prefill and decode share one instance. These are the baselines for the paper's
system and this one. Memory is counted in tokens of KV."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tetri.engine_request import Span
from tetri.policy.views import Progress


@dataclass(frozen=True, slots=True)
class CoupledLimits:
    """Limits of a coupled engine: at most `slots` requests hold memory at once, an iteration computes at most
    `step_tokens` tokens, and the memory holds `kv_tokens` tokens."""

    slots: int
    step_tokens: int
    kv_tokens: int


@dataclass(frozen=True, slots=True)
class CoupledView:
    """The state of a coupled engine. `started`: the prompt whose first chunks are computed; it holds a slot and all of
    its memory. `waiting`: prompts in order. `decoding`: number of requests. `free`: tokens of memory in no account."""

    started: Progress | None
    waiting: Sequence[Progress]
    decoding: int
    free: int


@dataclass(frozen=True, slots=True)
class Iteration:
    """One forward pass: these prompt spans, and one token of every decoding request if `decode`."""

    spans: tuple[Span, ...]
    decode: bool


def prefill_first(view: CoupledView, limits: CoupledLimits) -> Iteration:
    """vLLM of 2023, the paper's baseline. While a slot is free and a prompt waits, an iteration prefills whole prompts
    in order, as many as fit `step_tokens`, and the decodes stall; a longer prompt runs alone. Otherwise all decode."""
    spans: list[Span] = []
    budget, free = limits.step_tokens, view.free
    for prompt in view.waiting[: max(limits.slots - view.decoding, 0)]:
        tokens = prompt.goal - prompt.done
        if tokens + 1 > free or (tokens > budget and spans):
            break
        spans.append(Span(prompt.key, prompt.done, prompt.goal))
        budget, free = budget - tokens, free - tokens - 1
    return Iteration(tuple(spans), decode=not spans)


def chunked(view: CoupledView, limits: CoupledLimits) -> Iteration:
    """vLLM of today. Every decoding request takes one token of `step_tokens`; chunks of prompts fill the rest. A prompt
    starts when there is memory for all of it."""
    spans: list[Span] = []
    budget, free = limits.step_tokens - view.decoding, view.free - view.decoding
    slots = limits.slots - view.decoding
    if view.started is not None:
        budget -= _fill(view.started, budget, spans)
        slots -= 1
    for prompt in view.waiting[: max(slots, 0)]:
        tokens = prompt.goal - prompt.done
        if budget <= 0 or tokens + 1 > free:
            break
        budget -= _fill(prompt, budget, spans)
        free -= tokens + 1
    return Iteration(tuple(spans), decode=view.decoding > 0)


def _fill(prompt: Progress, budget: int, spans: list[Span]) -> int:
    tokens = min(prompt.goal - prompt.done, max(budget, 0))
    if tokens:
        spans.append(Span(prompt.key, prompt.done, prompt.done + tokens))
    return tokens


def preempted(held: Sequence[int], free: int) -> int:
    """How many of the youngest decoding requests must be preempted so that each other one can write one more token.
    `held`: tokens of memory per request, the oldest first. The oldest is never preempted."""
    out = 0
    while out < len(held) - 1 and free < len(held) - out:
        free += held[len(held) - 1 - out]
        out += 1
    return out


CoupledRule = Callable[[CoupledView, CoupledLimits], Iteration]
#: name -> rule
COUPLED: dict[str, CoupledRule] = {"prefill_first": prefill_first, "chunked": chunked}
