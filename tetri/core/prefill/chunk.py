"""The next prefill chunk: who may be in it, how far the store has slots for it, and whether the engine ran it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tetri.core.instance.peers import Identity
from tetri.core.prefill.kv_send import Spare
from tetri.core.prefill.queue import Queue
from tetri.core.prefill.request import PrefillRequest
from tetri.engine_request import Span
from tetri.policy.rules import CHUNKS
from tetri.policy.views import Progress

Requests = Mapping[str, PrefillRequest]


def candidates(
    queue: Queue, requests: Requests, started: Requests, budget: int, free: int, most: int
) -> list[Progress]:
    """The prompts that may be in a chunk of `buffer` tokens, in the order in which the engine runs them, up to `most` and
    until it is full: those whose leg it has, and those for which the `free` blocks are enough."""
    prompts, size = list[Progress](), budget
    if budget <= 0:
        return prompts
    for request in started.values():
        if budget <= 0 or len(prompts) == most:
            return prompts
        prompts.append(_progress(request))
        budget -= request.goal - request.done
    for key in queue.first(size):
        request = requests[key]
        if request.running:
            continue
        free -= request.flow.blocks
        if free < 0 or budget <= 0 or len(prompts) == most:
            break
        prompts.append(_progress(request))
        budget -= request.goal - request.done
    return prompts


def _progress(request: PrefillRequest) -> Progress:
    return Progress(request.key, request.done, request.goal)


def fill(
    own: Identity, budget: int, prompts: list[Progress], requests: Requests, started: Requests, slots: Spare
) -> list[Span]:
    """The next chunk of up to `buffer` tokens. Where one must wait for slots those behind it wait too, except for granted
    ones: what they keep comes back, and what they wait for is there."""
    spans = CHUNKS[own.rules.chunk](prompts, budget)
    chosen = _within(spans, requests, slots, budget, own)
    if len(chosen) == len(spans) or not any(request.granted for request in started.values()):
        return chosen
    first = {span.key for span in chosen}
    passing = [_progress(request) for key, request in started.items() if key in first or request.granted]
    unstarted = [prompt for prompt in prompts[: len(chosen)] if prompt.key not in started]
    again = CHUNKS[own.rules.chunk]((passing + unstarted)[: own.capacity.max_batch], budget)
    return _within(again, requests, slots, budget, own)


def _within(spans: list[Span], requests: Requests, slots: Spare, budget: int, own: Identity) -> list[Span]:
    """The first spans, as many as the store has `slots` for the KV that leaves with them; the KV of earlier chunks must
    leave before the rest is computed. When decodes that the engine preempts leave it tokens, it may run so many more of
    one than planned: up to the chunk's full size, not only `buffer`."""
    block, spare = own.capacity.block_tokens, own.capacity.chunk_tokens - budget
    free, free_open = slots.free, slots.open
    for place, span in enumerate(spans):
        request = requests[span.key]
        blocks = request.filled(min(span.stop + spare, request.goal), block) - request.flow.exported
        if blocks and blocks > (free if request.granted else min(free, free_open)):
            return spans[:place]
        free -= blocks
        free_open -= 0 if request.granted else blocks
    return spans


def ran(planned: Sequence[Span], spans: Sequence[Span], requests: Requests, *, strained: bool) -> bool:
    """Whether the engine ran what was planned. `strained`: it may have run more or less of each prompt, or left some
    out, but nothing else."""
    left = {span.key: span for span in planned}
    for span in spans:
        wanted = left.pop(span.key, None)
        if wanted is None:
            return False
        other = strained and wanted.start == span.start < span.stop <= requests[span.key].goal
        if span != wanted and not other:
            return False
    return strained or not left
