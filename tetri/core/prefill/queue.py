"""The queue of a prefill instance: the order of its prompts, how much work they are, and the next chunk of them."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

from tetri.core.actions import Broken
from tetri.core.instance.identity import Identity
from tetri.core.prefill.kv_send import Spare
from tetri.core.prefill.request import PrefillRequest
from tetri.engine_request import Span
from tetri.policy.order import Rank
from tetri.policy.rules import CHUNKS, ORDERS
from tetri.policy.views import Progress, QueuedPrompt

Requests = Mapping[str, PrefillRequest]


class Queue:
    """Jobs whose tokens are not all computed, by key: `raw` in order of arrival, `line` in order of execution.

    With a windowed order, windows of `raw` move into `line` when a chunk wants them. Without windows `line` holds only
    what was started, and the rest of the order is made anew for each chunk: whoever comes with a lower rank goes first.

    tokens, seconds   what is still to be computed of all of them, predicted by the cost table
    """

    def __init__(self, own: Identity) -> None:
        self.own = own
        self.order = ORDERS[own.rules.order]
        self.raw: dict[str, QueuedPrompt] = {}
        self.line: dict[str, None] = {}
        self.tokens = 0
        self.seconds = 0.0
        self._line_tokens = 0
        self._ranked: list[tuple[Rank, str]] = []  # `raw` by rank, unless windows are ranked

    def __len__(self) -> int:
        return len(self.raw) + len(self.line)

    def enter(self, request: PrefillRequest) -> None:
        self.raw[request.key] = request.queued
        self.tokens += request.goal
        self.seconds += request.left_s
        if not self.order.windowed:
            insort(self._ranked, self._rank(request.queued))

    def first(self, tokens: int) -> Iterator[str]:
        """Keys in order of execution, at least as many as have so many tokens, if there are. With windows no more of
        them are ordered than that takes: whoever comes later is ordered with more company. A window never goes before
        an earlier one, which bounds how long a prompt is passed over."""
        rules = self.own.rules
        while self.order.windowed and self.raw and self._line_tokens < tokens:
            window = list(islice(self.raw.values(), rules.sched_batch))
            for key in self.order.keys(window, rules.stretch):
                self.line[key] = None
                self._line_tokens += self.raw.pop(key).tokens
        yield from self.line
        for _, key in self._ranked:
            yield key

    def start(self, request: PrefillRequest) -> None:
        """The engine has its leg: from now on nobody goes before it."""
        if request.key in self.raw:
            self._unrank(request)
            self.line[request.key] = None
            self._line_tokens += request.goal

    def computed(self, request: PrefillRequest, done: int) -> None:
        """One in line has `done` tokens computed."""
        fewer = done - request.done
        left_s = self.own.cost.prompt_s(request.goal, done, self.own.capacity.chunk_tokens)
        self.tokens -= fewer
        self._line_tokens -= fewer
        self.seconds += left_s - request.left_s
        request.done, request.left_s = done, left_s

    def leave(self, request: PrefillRequest) -> None:
        """All of it is computed, or nobody wants it any more."""
        if request.key in self.raw:
            self._unrank(request)
        else:
            del self.line[request.key]
            self._line_tokens -= request.goal - request.done
        self.tokens -= request.goal - request.done
        self.seconds = self.seconds - request.left_s if self.tokens else 0.0  # without what rounding leaves

    def _unrank(self, request: PrefillRequest) -> None:
        del self.raw[request.key]
        if not self.order.windowed:
            del self._ranked[bisect_left(self._ranked, self._rank(request.queued))]

    def _rank(self, prompt: QueuedPrompt) -> tuple[Rank, str]:
        return self.order.rank(prompt, self.own.rules.stretch), prompt.key

    def check(self, requests: Mapping[str, PrefillRequest]) -> None:
        """Count everything again."""
        for key in (*self.raw, *self.line):
            if requests[key].token is not None:
                raise Broken(f"{key} has its token and is still queued")
        if {key for key, request in requests.items() if request.token is None} != {*self.raw, *self.line}:
            raise Broken("not all jobs without a token are queued")
        left = [request.goal - request.done for request in map(requests.__getitem__, (*self.raw, *self.line))]
        line = sum(left[len(self.raw) :])
        if (sum(left), line) != (self.tokens, self._line_tokens):
            raise Broken(f"{self.tokens} tokens queued, {self._line_tokens} in line: counted {sum(left)}, {line}")
        seconds = sum(requests[key].left_s for key in (*self.raw, *self.line))
        if abs(seconds - self.seconds) > 1e-6 * max(1.0, seconds):
            raise Broken(f"{self.seconds} seconds of work queued, counted {seconds}")
        ranked = [] if self.order.windowed else sorted(map(self._rank, self.raw.values()))
        if ranked != self._ranked:
            raise Broken("the ranks and the queue differ")


# ------------------------------------------------------------ the next chunk


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
