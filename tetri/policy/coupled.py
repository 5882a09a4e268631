"""What the next iteration of a coupled engine runs, where prefill and decode share one instance: the baselines that
the paper's system and this one are compared with. Memory is counted in tokens of KV."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tetri.engine_request import Span
from tetri.policy.views import Progress


@dataclass(frozen=True, slots=True)
class CoupledLimits:
    """`slots` requests may hold memory at once; an iteration computes at most `step_tokens` tokens; `kv_tokens` of
    memory in all."""

    slots: int
    step_tokens: int
    kv_tokens: int


@dataclass(frozen=True, slots=True)
class CoupledView:
    """Who waits and what runs. `started`: the prompt that a chunk of was computed already, and that holds a slot and
    its memory; `waiting` in order, `decoding` requests, `free` tokens of memory in no account."""

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
    """vLLM of 2023, the paper's baseline: while a slot is free and a prompt waits, an iteration prefills whole prompts
    in order, as many as fit `step_tokens`, and the decodes stall; a longer prompt goes alone. Otherwise all decode."""
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
    """vLLM of today: every decoding request takes one token of `step_tokens` first, and prompts, cut where it ends,
    fill the rest. A prompt starts when memory for all of it is there."""
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
    """How many of the decoding requests, the youngest ones, must give up their memory so that each of the others can
    take one token more. `held`: tokens of memory by age, the oldest first. The oldest is never given up."""
    out = 0
    while out < len(held) - 1 and free < len(held) - out:
        free += held[len(held) - 1 - out]
        out += 1
    return out


#: name -> rule
COUPLED: dict[str, Callable[[CoupledView, CoupledLimits], Iteration]] = {
    "prefill_first": prefill_first,
    "chunked": chunked,
}
