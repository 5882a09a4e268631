"""The next prefill chunk: who may be in it, how far the store has slots for it, and whether the engine ran it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tetri.core.job import Job
from tetri.core.queue import Queue
from tetri.leg import Span
from tetri.policy.views import Progress


def candidates(queue: Queue, jobs: Mapping[str, Job], room: int, free: int, most: int) -> list[Progress]:
    """The prompts that may be in a chunk of `room` tokens, in order, up to `most` and until it is full: the engine has
    their leg, or the `free` blocks are enough for it."""
    prompts: list[Progress] = []
    if room <= 0:
        return prompts
    for key in queue.first(room):
        job = jobs[key]
        free -= 0 if job.running else job.flow.blocks
        if (free < 0 and not job.running) or room <= 0 or len(prompts) == most:
            break
        prompts.append(Progress(key, job.done, job.goal))
        room -= job.goal - job.done
    return prompts


def within(spans: list[Span], jobs: Mapping[str, Job], slots: int, spare: int, block_tokens: int) -> list[Span]:
    """The first spans, as many as the store has `slots` for the KV that leaves with them; the KV of earlier chunks must
    leave before the rest is computed. The engine may run up to `spare` tokens more of one than planned, when decodes
    that it preempts leave them."""
    for place, span in enumerate(spans):
        job = jobs[span.key]
        slots -= job.filled(min(span.stop + spare, job.goal), block_tokens) - job.flow.exported
        if slots < 0:
            return spans[:place]
    return spans


def ran(planned: Sequence[Span], spans: Sequence[Span], jobs: Mapping[str, Job], *, strained: bool) -> bool:
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
