"""Which landed requests enter the running batch of a decode instance (paper, section 3.4).

What all share, where the paper is silent. The order is that of landing, and the head of the line blocks: a large
request that does not fit now would otherwise be passed over for ever, while the blocks that its KV fills lie idle.
Memory is counted in KV blocks, each request's rounded up. A waiting request's own blocks are in no one's way: they
were given to it when its prefill instance was granted the place, so that admission decides on growth alone. Before
its turn they are in nobody's reckoning, neither free nor to come free.

`end` of a request is its predicted end by `Rules.admit_end`. The paper uses the low end; the default is the high one,
which most requests do not pass.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Iterator, Sequence

from tetri.policy.views import BatchMember, BatchView, WaitingRequest
from tetri.request import blocks_for

#: Share of the memory that `peak` leaves alone, for those that outlive their prediction: nobody counted on what they
#: take. Simulated with an accuracy of 74.9 %, high ends, and 256 requests of the paper's figure 1 that come at once, at
#: two sizes of memory at which greedy admission preempts 10 and 20 % of them: without it peak preempts 1.7 and 1.0 %,
#: with it 0.0 and 0.5 %, and the mean JCT is at most 0.7 % longer.
MARGIN = 0.02


def greedy(waiting: Sequence[WaitingRequest], batch: BatchView) -> list[str]:
    """Admit while the batch has a slot and memory is not yet overdrawn (vLLM's way). Nothing is set aside for the
    output to come, so the engine may have to preempt."""
    return [] if batch.free_blocks < 0 else [request.key for request in _in_turn(waiting, batch)]


def reserve_static(waiting: Sequence[WaitingRequest], batch: BatchView) -> list[str]:
    """Admit while what a request will take in addition until its end is free now. What running requests were promised
    is not subtracted, since the paper compares with "the memory available in the current iteration"; what those were
    promised that this call admits is, or a burst would be admitted against the same blocks."""
    keys, free = [], batch.free_blocks
    for request in _in_turn(waiting, batch):
        free -= max(blocks_for(_end(request), batch.block_tokens) - request.blocks, 0)
        if free < 0:
            break
        keys.append(request.key)
    return keys


def reserve_dynamic(waiting: Sequence[WaitingRequest], batch: BatchView) -> list[str]:
    """Admit while at least one block would be spare at the moment at which the shortest job of the batch ends, the new
    one included: all that are left have grown until then, and what ends then has given its blocks back. Its next token
    must fit now. Blind to what happens later: when the long ones go on growing, memory may still run out."""
    size, free = batch.block_tokens, batch.free_blocks
    requests = [(_left(member), member.tokens) for member in batch.running]
    budget = free + _held(batch)
    first = min((left for left, _ in requests), default=0)
    used = _used_at(first, requests, size)
    keys = []
    for request in _in_turn(waiting, batch):
        budget += request.blocks
        free -= max(blocks_for(request.tokens + 1, size) - request.blocks, 0)
        requests.append((_left(request), request.tokens))
        if len(requests) == 1 or _left(request) < first:
            first = _left(request)
            used = _used_at(first, requests, size)
        elif _left(request) > first:
            used += blocks_for(request.tokens + first, size)
        if free < 0 or used >= budget:
            break
        keys.append(request.key)
    return keys


def peak(waiting: Sequence[WaitingRequest], batch: BatchView) -> list[str]:
    """Admit while the largest memory that the batch will ever take, by all its members' predicted ends, fits, the new
    one included. Not in the paper: it is the Past-Future scheduler's test (arXiv 2507.10150), with predicted lengths
    instead of sampled ones, and a `MARGIN`. With true ends the engine never preempts: `growth_to_peak` keeps new grants
    out of what it has counted on. Needs the high end of the range to keep that up when ranges are all that is known.

    Memory only grows until somebody ends, so its peaks are at the ends. Members are sorted by what they have left, once
    a call; each candidate is inserted and costs one walk over the batch, none while all would fit at their ends."""
    size = batch.block_tokens
    requests = _last_first(batch)
    budget = batch.free_blocks + _held(batch) - _margin(batch)
    at_ends = sum(blocks_for(tokens - less, size) for less, tokens in requests)  # if all were at their ends at once
    keys = []
    for request in _in_turn(waiting, batch):
        budget += request.blocks
        at_ends += blocks_for(_end(request), size)
        insort(requests, (-_left(request), request.tokens))
        if at_ends > budget and _largest(requests, size) > budget:
            break
        keys.append(request.key)
    return keys


def growth_to_peak(batch: BatchView) -> int:
    """Blocks that the running batch will take in addition to what it has, at its peak: no request may be granted them
    meanwhile. What is kept free so is the other half of `peak`: without it, blocks for requests whose KV is only on
    its way eat what the running ones were admitted against, and even with true ends many are preempted. 0 when nothing
    runs: then whoever comes may have all."""
    if not batch.running:
        return 0
    return max(_largest(_last_first(batch), batch.block_tokens) - _held(batch) + _margin(batch), 0)


def _margin(batch: BatchView) -> int:
    return int(MARGIN * max(batch.free_blocks + _held(batch), 0))


def _last_first(batch: BatchView) -> list[tuple[int, int]]:
    """The running ones as (-steps left, tokens), those that end last first."""
    return sorted((-_left(member), member.tokens) for member in batch.running)


def _held(batch: BatchView) -> int:
    return sum(blocks_for(member.tokens, batch.block_tokens) for member in batch.running)


def _largest(requests: Iterable[tuple[int, int]], size: int) -> int:
    """The most blocks that are taken at any end. `requests` are (-steps left, tokens), those that end last first: at the
    end of each, it and those before it are there. A job of t tokens takes ceil((t + steps) / size) blocks after so
    many steps. With t + size - 1 = whole x size + rest, and steps likewise, that is the sum of both wholes, and one
    more where both rests make up a block: so wholes are added up, and rests counted, and nothing is computed twice."""
    most, wholes, rests = 0, 0, [0] * size
    for count, (less, tokens) in enumerate(requests, 1):
        whole, rest = divmod(tokens + size - 1, size)
        steps, part = divmod(-less, size)
        wholes += whole
        rests[rest] += 1
        most = max(most, wholes + count * steps + sum(rests[size - part :]))
    return most


def _used_at(moment: int, requests: Iterable[tuple[int, int]], size: int) -> int:
    """Blocks of the (steps left, tokens) that go on after so many steps."""
    return sum(blocks_for(tokens + moment, size) for left, tokens in requests if left > moment)


def _in_turn(waiting: Sequence[WaitingRequest], batch: BatchView) -> Iterator[WaitingRequest]:
    """In the order of landing, as many as there are slots for."""
    slots = max(batch.max_batch - len(batch.running), 0)
    return iter(sorted(waiting, key=lambda request: request.landed)[:slots])


def _left(request: BatchMember | WaitingRequest) -> int:
    """Steps until its predicted end, at least one: it would have ended otherwise."""
    return max(request.end - request.tokens, 1)


def _end(request: BatchMember | WaitingRequest) -> int:
    return request.tokens + _left(request)
