"""Which landed requests enter the running batch of a decode instance (paper, section 3.4).

What all share, where the paper is silent. The order is that of landing, and the head of the line blocks: a large
request that does not fit now would otherwise be passed over for ever, while the blocks that its KV fills lie idle.
Memory is counted in KV blocks, each request's rounded up. A waiting request's own blocks are in no one's way: they
were given to it when its prefill instance was granted the place, so that admission decides on growth alone. Before
its turn they are in nobody's reckoning, neither free nor to come free.

`end` of a request is its predicted end by `Rules.admit_end`: the paper uses the low end.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Iterator, Sequence

from tetri.policy.views import BatchView, Member, WaitingSeat
from tetri.request import blocks_for


def greedy(waiting: Sequence[WaitingSeat], batch: BatchView) -> list[str]:
    """Admit while the batch has a slot and memory is not yet overdrawn (vLLM's way). Nothing is set aside for the
    output to come, so the engine may have to preempt."""
    return [] if batch.free_blocks < 0 else [seat.key for seat in _in_turn(waiting, batch)]


def reserve_static(waiting: Sequence[WaitingSeat], batch: BatchView) -> list[str]:
    """Admit while what a request will take in addition until its end is free now. What running requests were promised
    is not subtracted, since the paper compares with "the memory available in the current iteration"; what those were
    promised that this call admits is, or a burst would be admitted against the same blocks."""
    keys, free = [], batch.free_blocks
    for seat in _in_turn(waiting, batch):
        free -= max(blocks_for(_end(seat), batch.block_tokens) - seat.blocks, 0)
        if free < 0:
            break
        keys.append(seat.key)
    return keys


def reserve_dynamic(waiting: Sequence[WaitingSeat], batch: BatchView) -> list[str]:
    """Admit while at least one block would be spare at the moment at which the shortest job of the batch ends, the new
    one included: all that are left have grown until then, and what ends then has given its blocks back. Its next token
    must fit now. Blind to what happens later: when the long ones go on growing, memory may still run out."""
    size, free = batch.block_tokens, batch.free_blocks
    jobs = [(_left(member), member.tokens) for member in batch.running]
    room = free + sum(blocks_for(tokens, size) for _, tokens in jobs)
    first = min((left for left, _ in jobs), default=0)
    used = _used_at(first, jobs, size)
    keys = []
    for seat in _in_turn(waiting, batch):
        room += seat.blocks
        free -= max(blocks_for(seat.tokens + 1, size) - seat.blocks, 0)
        jobs.append((_left(seat), seat.tokens))
        if len(jobs) == 1 or _left(seat) < first:
            first = _left(seat)
            used = _used_at(first, jobs, size)
        elif _left(seat) > first:
            used += blocks_for(seat.tokens + first, size)
        if free < 0 or used >= room:
            break
        keys.append(seat.key)
    return keys


def peak(waiting: Sequence[WaitingSeat], batch: BatchView) -> list[str]:
    """Admit while the largest memory that the batch will ever take, by all its members' predicted ends, fits, the new
    one included. Not in the paper: it is the Past-Future scheduler's test (arXiv 2507.10150), with predicted lengths
    instead of sampled ones. With true ends, and blocks that nobody else takes meanwhile, the engine never preempts.

    Memory only grows until somebody ends, so its peaks are at the ends. Members are sorted by what they have left, once
    a call; each candidate is inserted and costs one walk over the batch."""
    size = batch.block_tokens
    jobs = sorted((-_left(member), member.tokens) for member in batch.running)
    room = batch.free_blocks + sum(blocks_for(tokens, size) for _, tokens in jobs)
    at_ends = sum(blocks_for(tokens - less, size) for less, tokens in jobs)  # if all were at their ends at once
    keys = []
    for seat in _in_turn(waiting, batch):
        room += seat.blocks
        at_ends += blocks_for(_end(seat), size)
        insort(jobs, (-_left(seat), seat.tokens))
        if at_ends > room and not _peaks_fit(jobs, size, room):
            break
        keys.append(seat.key)
    return keys


def _peaks_fit(jobs: Iterable[tuple[int, int]], size: int, room: int) -> bool:
    """Whether `room` blocks are enough at every end. `jobs` are (-steps left, tokens), those that end last first: at
    the end of each, it and those before it are there. A job of t tokens takes ceil((t + steps) / size) blocks after so
    many steps. With t + size - 1 = whole x size + rest, and steps likewise, that is the sum of both wholes, and one
    more where both rests make up a block: so wholes are added up, and rests counted, and nothing is computed twice."""
    wholes, rests = 0, [0] * size
    for count, (less, tokens) in enumerate(jobs, 1):
        whole, rest = divmod(tokens + size - 1, size)
        steps, part = divmod(-less, size)
        wholes += whole
        rests[rest] += 1
        if wholes + count * steps + sum(rests[size - part :]) > room:
            return False
    return True


def _used_at(moment: int, jobs: Iterable[tuple[int, int]], size: int) -> int:
    """Blocks of the (steps left, tokens) that go on after so many steps."""
    return sum(blocks_for(tokens + moment, size) for left, tokens in jobs if left > moment)


def _in_turn(waiting: Sequence[WaitingSeat], batch: BatchView) -> Iterator[WaitingSeat]:
    """In the order of landing, as many as there are slots for."""
    slots = max(batch.max_batch - len(batch.running), 0)
    return iter(sorted(waiting, key=lambda seat: seat.landed)[:slots])


def _left(job: Member | WaitingSeat) -> int:
    """Steps until its predicted end, at least one: it would have ended otherwise."""
    return max(job.end - job.tokens, 1)


def _end(job: Member | WaitingSeat) -> int:
    return job.tokens + _left(job)
