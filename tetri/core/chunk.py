"""The next prefill chunk: who may be in it, how far the store has slots for it, and whether the engine ran it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tetri.core.job import Job
from tetri.core.leaving import Spare
from tetri.core.peers import Identity
from tetri.core.queue import Queue
from tetri.leg import Span
from tetri.policy.rules import CHUNKS
from tetri.policy.views import Progress

Jobs = Mapping[str, Job]


def candidates(queue: Queue, jobs: Jobs, started: Jobs, room: int, free: int, most: int) -> list[Progress]:
    """The prompts that may be in a chunk of `room` tokens, in the order in which the engine runs them, up to `most` and
    until it is full: those whose leg it has, and those for which the `free` blocks are enough."""
    prompts, size = list[Progress](), room
    if room <= 0:
        return prompts
    for job in started.values():
        if room <= 0 or len(prompts) == most:
            return prompts
        prompts.append(_progress(job))
        room -= job.goal - job.done
    for key in queue.first(size):
        job = jobs[key]
        if job.running:
            continue
        free -= job.flow.blocks
        if free < 0 or room <= 0 or len(prompts) == most:
            break
        prompts.append(_progress(job))
        room -= job.goal - job.done
    return prompts


def _progress(job: Job) -> Progress:
    return Progress(job.key, job.done, job.goal)


def fill(own: Identity, room: int, prompts: list[Progress], jobs: Jobs, started: Jobs, slots: Spare) -> list[Span]:
    """The next chunk of up to `room` tokens. Where one must wait for slots those behind it wait too, except for granted
    ones: what they keep comes back, and what they wait for is there."""
    spans = CHUNKS[own.rules.chunk](prompts, room)
    chosen = _within(spans, jobs, slots, room, own)
    if len(chosen) == len(spans) or not any(job.granted for job in started.values()):
        return chosen
    first = {span.key for span in chosen}
    passing = [_progress(job) for key, job in started.items() if key in first or job.granted]
    unstarted = [prompt for prompt in prompts[: len(chosen)] if prompt.key not in started]
    again = CHUNKS[own.rules.chunk]((passing + unstarted)[: own.capacity.max_batch], room)
    return _within(again, jobs, slots, room, own)


def _within(spans: list[Span], jobs: Jobs, slots: Spare, room: int, own: Identity) -> list[Span]:
    """The first spans, as many as the store has `slots` for the KV that leaves with them; the KV of earlier chunks must
    leave before the rest is computed. When decodes that the engine preempts leave it tokens, it may run so many more of
    one than planned: up to the chunk's full size, not only `room`."""
    block, spare = own.capacity.block_tokens, own.capacity.chunk_tokens - room
    free, free_open = slots.free, slots.open
    for place, span in enumerate(spans):
        job = jobs[span.key]
        blocks = job.filled(min(span.stop + spare, job.goal), block) - job.flow.exported
        if blocks and blocks > (free if job.granted else min(free, free_open)):
            return spans[:place]
        free -= blocks
        free_open -= 0 if job.granted else blocks
    return spans


def ran(planned: Sequence[Span], spans: Sequence[Span], jobs: Jobs, *, strained: bool) -> bool:
    """Whether the engine ran what was planned. `strained`: it may have run more or less of each prompt, or left some
    out, but nothing else."""
    left = {span.key: span for span in planned}
    for span in spans:
        wanted = left.pop(span.key, None)
        if wanted is None:
            return False
        other = strained and wanted.start == span.start < span.stop <= jobs[span.key].goal
        if span != wanted and not other:
            return False
    return strained or not left
