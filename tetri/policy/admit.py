"""Admission policies: which landed requests enter the running batch of a decode instance (paper, section 3.4).

All policies share these rules, which the paper leaves open. Requests are admitted in the order in which their next
tokens are late: with one limit of TPOT for all, in the order of their first tokens. A request that does not fit blocks
those behind it: otherwise a large one could starve while its KV blocks lie idle.
Memory is counted in KV blocks, rounded up per request. A waiting request already owns the blocks of its KV, since the
grant reserved them, so admission decides only on growth. Until a request is considered, its blocks count neither as
free nor as memory that will become free.

`end` of a request is its predicted output end according to `Rules.admit_end`. The paper uses the low end; the default
is the high end, which most requests do not exceed.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Iterator, Sequence

from tetri.policy.views import BatchMember, BatchView, WaitingRequest
from tetri.request import blocks_for

#: Share of the memory that `peak` keeps in reserve for requests that exceed their predicted end. In a simulation (256
#: requests of the paper's figure 1 at once, accuracy 74.9 %, high ends, two memory sizes at which greedy admission
#: preempted 10 and 20 % of the requests before grants left `next_growth` free), peak preempted 1.7 and 1.0 % without
#: the margin and 0.0 and 0.5 % with it; the mean JCT grew by at most 0.7 %.
MARGIN = 0.02


def greedy(waiting: Sequence[WaitingRequest], batch: BatchView) -> list[str]:
    """Admit while the batch has a slot and the memory is not overcommitted, as vLLM does. No memory is reserved for
    future output, so the engine may have to preempt."""
    return [] if batch.free_blocks < 0 else [request.key for request in _in_turn(waiting, batch)]


def next_growth(running: int) -> int:
    """Blocks that a batch of so many requests grows by next: two for each. No grant takes them: otherwise requests
    whose KV only arrives would take all memory, and running ones be preempted at once. In a simulation of the Azure
    conversation trace at 20 times its speed on 64 + 64 instances with greedy admission, of 6,000 requests 342 were
    preempted without this and 25 with it, and the mean JCT was 4 % shorter."""
    return 2 * running


def reserve_static(waiting: Sequence[WaitingRequest], batch: BatchView) -> list[str]:
    """Admit while the blocks that a request needs in addition until its end are free now. The predicted growth of
    running requests is not subtracted, since the paper compares with "the memory available in the current iteration".
    The growth of requests admitted in the same call is subtracted; otherwise a burst would be admitted against the
    same blocks."""
    keys, free = [], batch.free_blocks
    for request in _in_turn(waiting, batch):
        free -= max(blocks_for(_end(request), batch.block_tokens) - request.blocks, 0)
        if free < 0:
            break
        keys.append(request.key)
    return keys


def reserve_dynamic(waiting: Sequence[WaitingRequest], batch: BatchView) -> list[str]:
    """Admit while at least one block remains free when the shortest request of the batch, with the new one, ends. By
    then the remaining requests have grown, and the ended one has freed its blocks. The new request's next token must
    fit now. The policy looks no further ahead: memory may still run out when the long requests grow on."""
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
    """Admit while the peak memory of the batch, with the new request, fits; the peak follows from the predicted ends
    of all members. Not in the paper: this is the test of the Past-Future scheduler (arXiv 2507.10150) with predicted
    instead of sampled lengths, and with a `MARGIN`. With true ends the engine never preempts, since `growth_to_peak`
    keeps new grants away from the memory that admission counts on. With length ranges this needs the high end.

    Memory grows until a request ends, so the peaks are at the ends. Members are sorted by steps left once per call.
    Each candidate is inserted and costs one pass over the batch, or none while all requests fit at their ends."""
    size = batch.block_tokens
    requests = _last_first(batch)
    budget = batch.free_blocks + _held(batch) - _margin(batch)
    at_ends = sum(blocks_for(tokens - less, size) for less, tokens in requests)  # if all reached their ends at once
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
    """Blocks that the running batch needs at its peak in addition to what it has; they must not be granted to new
    requests. `peak` depends on this: otherwise reservations for requests whose KV is still being moved would use up
    the memory that running requests were admitted against, and many would be preempted even with true ends. 0 if
    nothing runs."""
    if not batch.running:
        return 0
    return max(_largest(_last_first(batch), batch.block_tokens) - _held(batch) + _margin(batch), 0)


def _margin(batch: BatchView) -> int:
    return int(MARGIN * max(batch.free_blocks + _held(batch), 0))


def _last_first(batch: BatchView) -> list[tuple[int, int]]:
    """The running requests as (-steps left, tokens), those that end last first."""
    return sorted((-_left(member), member.tokens) for member in batch.running)


def _held(batch: BatchView) -> int:
    return sum(blocks_for(member.tokens, batch.block_tokens) for member in batch.running)


def _largest(requests: Iterable[tuple[int, int]], size: int) -> int:
    """Most blocks in use at the end of any request. `requests` are (-steps left, tokens), those that end last first:
    at the end of a request, it and those before it in this order are running. After s steps, a request of t tokens
    needs ceil((t + s) / size) blocks. Let t + size - 1 = whole x size + rest and s = steps x size + part: then it
    needs whole + steps blocks, and one more if rest + part >= size. Keeping the sum of `whole` and a histogram of
    `rest` makes each end cost O(size)."""
    most, wholes, rests = 0, 0, [0] * size
    for count, (less, tokens) in enumerate(requests, 1):
        whole, rest = divmod(tokens + size - 1, size)
        steps, part = divmod(-less, size)
        wholes += whole
        rests[rest] += 1
        most = max(most, wholes + count * steps + sum(rests[size - part :]))
    return most


def _used_at(moment: int, requests: Iterable[tuple[int, int]], size: int) -> int:
    """Blocks after `moment` steps of the (steps left, tokens) that are still running then."""
    return sum(blocks_for(tokens + moment, size) for left, tokens in requests if left > moment)


def _in_turn(waiting: Sequence[WaitingRequest], batch: BatchView) -> Iterator[WaitingRequest]:
    """Waiting requests, those that are late first before the others, as many as the batch has slots."""
    slots = max(batch.max_batch - len(batch.running), 0)
    return iter(sorted(waiting, key=lambda request: (request.due, request.landed))[:slots])


def _left(request: BatchMember | WaitingRequest) -> int:
    """Steps until the predicted end; at least one, since the request has not ended."""
    return max(request.end - request.tokens, 1)


def _end(request: BatchMember | WaitingRequest) -> int:
    return request.tokens + _left(request)
