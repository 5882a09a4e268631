"""The queue of a prefill instance: orders the prompts, sums their remaining work and packs the next chunk."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice, takewhile

from tetri.core.actions import Broken
from tetri.core.instance.identity import Identity
from tetri.core.prefill.kv_send import Spare
from tetri.core.prefill.request import PrefillRequest
from tetri.engine_request import Span
from tetri.policy.order import Rank
from tetri.policy.rules import CHUNKS, order_of
from tetri.policy.views import Progress, QueuedPrompt

Requests = Mapping[str, PrefillRequest]


class Queue:
    """Keys of the requests whose tokens are not all computed: `raw` in order of arrival, `line` in order of execution.

    With a windowed order, a window of `raw` moves to `line` when a chunk needs more prompts. Otherwise `line` holds
    only the started requests and the rest is sorted by rank: a later request with a lower rank goes first, and may
    overtake started ones. In any order, `canaries` come last.

    started   those of the requests in `line` whose engine request is in the engine, by key
    short     whether the first prompt waits for slots
    tokens    tokens that are still to be computed
    seconds   the time that this takes by the cost table; not corrected, so that the sum outlives a new correction
    """

    def __init__(self, own: Identity) -> None:
        self.own = own
        self.order = order_of(own.rules.order, own.instance.role)
        self.raw: dict[str, QueuedPrompt] = {}
        self.line: dict[str, None] = {}
        self.canaries: dict[str, None] = {}
        self.started: dict[str, PrefillRequest] = {}
        self.short = False
        self.tokens = 0
        self.seconds = 0.0
        self._line_tokens = 0
        self._ranked: list[tuple[Rank, str]] = []  # `raw` by rank; empty with a windowed order

    def __len__(self) -> int:
        return len(self.raw) + len(self.line) + len(self.canaries)

    def enter(self, request: PrefillRequest) -> None:
        """Add a new request."""
        self.tokens += request.goal
        self.seconds += request.left_s
        if request.pinned:
            self.canaries[request.key] = None
            return
        self.raw[request.key] = request.queued
        if not self.order.windowed:
            insort(self._ranked, self._rank(request.queued))

    def first(self, tokens: int) -> Iterator[str]:
        """Yield keys in order of execution: enough for a chunk of `tokens`, if there are as many.

        With a windowed order, no more windows are sorted than that takes, so that later arrivals are sorted together
        with more prompts. A window never overtakes an earlier one, which bounds how long a prompt waits."""
        rules = self.own.rules
        while self.order.windowed and self.raw and self._line_tokens < tokens:
            window = list(islice(self.raw.values(), rules.sched_batch))
            for key in self.order.keys(window, rules.stretch):
                self.line[key] = None
                self._line_tokens += self.raw.pop(key).tokens
        yield from self.line
        for _, key in self._ranked:
            yield key
        yield from self.canaries

    def overtaking(self) -> Iterator[str]:
        """Yield the keys that go before all started requests, in order: their ranks are lower than those of what is
        left of these. None with a windowed order."""
        if self._ranked and self.started:
            stretch = self.own.rules.stretch
            least = min([self.order.rank(request.left, stretch) for request in self.started.values()])
            for rank, key in self._ranked:
                if rank > least:
                    return
                yield key

    def first_unstarted(self) -> str | None:
        """Return the first key in order of execution whose engine request is not in the engine; None without one."""
        if len(self.started) == len(self):
            return None
        return next((key for key in self.first(1) if key not in self.started), None)

    def start(self, request: PrefillRequest) -> None:
        """Move a request to `line` when its engine request starts."""
        if request.key not in self.line:
            self._unqueue(request)
            self.line[request.key] = None
            self._line_tokens += request.goal
        self.started[request.key] = request
        request.running = True

    def stop(self, request: PrefillRequest) -> None:
        """Record that its engine request is no longer in the engine."""
        del self.started[request.key]
        request.running = request.held = False

    def blocked(self) -> PrefillRequest | None:
        """Return the request that holds KV blocks and cannot go on: it waits for slots, and no decode instance has
        granted it. None if there is none."""
        request = next(iter(self.started.values()), None) if self.short else None
        return None if request is None or request.granted else request

    def computed(self, request: PrefillRequest, done: int) -> None:
        """Record that `done` tokens of a request in `line` are computed; fewer than before after a preemption."""
        fewer = done - request.done
        left_s = self.own.cost.prompt_s(request.goal, done, self.own.capacity.chunk_tokens)
        self.tokens -= fewer
        self._line_tokens -= fewer
        self.seconds += left_s - request.left_s
        request.done, request.left_s = done, left_s

    def leave(self, request: PrefillRequest) -> None:
        """Remove a request that is completely computed, or given up."""
        if request.key not in self.line:
            self._unqueue(request)
        else:
            del self.line[request.key]
            self._line_tokens -= request.goal - request.done
        self.tokens -= request.goal - request.done
        self.seconds -= request.left_s
        if not self.tokens:
            self.seconds = 0.0  # without the rounding error of the sums

    def _unqueue(self, request: PrefillRequest) -> None:
        if request.pinned:
            del self.canaries[request.key]
            return
        del self.raw[request.key]
        if not self.order.windowed:
            del self._ranked[bisect_left(self._ranked, self._rank(request.queued))]

    def _rank(self, prompt: QueuedPrompt) -> tuple[Rank, str]:
        return self.order.rank(prompt, self.own.rules.stretch), prompt.key

    def check(self, requests: Mapping[str, PrefillRequest]) -> None:
        """Raise Broken when the queue and its sums disagree with the requests."""
        queued = [*self.raw, *self.canaries, *self.line]
        for key in queued:
            if requests[key].computed:
                raise Broken(f"{key} has its token and is still queued")
        if {key for key, request in requests.items() if not request.computed} != {*queued}:
            raise Broken("not all requests without a token are queued")
        left = [requests[key].goal - requests[key].done for key in queued]
        line = sum(left[len(queued) - len(self.line) :])
        if (sum(left), line) != (self.tokens, self._line_tokens):
            raise Broken(f"{self.tokens} tokens queued, {self._line_tokens} in line: counted {sum(left)}, {line}")
        seconds = sum(requests[key].left_s for key in queued)
        if abs(seconds - self.seconds) > 1e-6 * max(1.0, seconds):
            raise Broken(f"{self.seconds} seconds of work queued, counted {seconds}")
        ranked = [] if self.order.windowed else sorted(map(self._rank, self.raw.values()))
        if ranked != self._ranked:
            raise Broken("the ranks and the queue differ")


# ------------------------------------------------------------ the next chunk


def candidates(queue: Queue, requests: Requests, budget: int, free: int, most: int) -> list[Progress]:
    """Return the prompts for a chunk of up to `budget` tokens, `most` at most, in the order in which the engine runs
    them: first the started ones, then those for which the `free` KV blocks suffice."""
    prompts: list[Progress] = []
    chunk_tokens = budget
    if budget <= 0:
        return prompts
    for request in queue.started.values():
        if budget <= 0 or len(prompts) == most:
            return prompts
        prompts.append(_progress(request))
        budget -= request.goal - request.done
    if len(queue.started) == len(queue):
        return prompts
    return prompts + _fitting(queue.first(chunk_tokens), requests, budget, free, most - len(prompts))


def overtaking(queue: Queue, requests: Requests, budget: int, free: int, most: int) -> list[Progress]:
    """Return the prompts of a chunk that overtakes the started ones, as `candidates`; none without memory."""
    return _fitting(queue.overtaking(), requests, budget, free, most - len(queue.started))


def _fitting(keys: Iterable[str], requests: Requests, budget: int, free: int, most: int) -> list[Progress]:
    """The first prompts that are not started, as far as tokens, KV blocks and requests suffice."""
    prompts: list[Progress] = []
    for request in map(requests.__getitem__, keys):
        if request.running:
            continue
        free -= request.flow.blocks
        if free < 0 or budget <= 0 or len(prompts) >= most:
            break
        prompts.append(_progress(request))
        budget -= request.goal - request.done
    return prompts


def groups(
    prompts: list[Progress], requests: Requests, started: Requests
) -> Iterator[tuple[list[Progress], Requests]]:
    """Yield prompts that may share a chunk, each group with the started requests that may overtake in it; the first
    group that fills a chunk is to be used. A request that must be alone has its turn in the order of the prompts. When
    a request waits for slots, granted ones overtake it (`fill`): those that can share a chunk, then lone ones."""
    if not any([requests[prompt.key].alone for prompt in prompts]):
        yield prompts, started
        return
    shared = {key: request for key, request in started.items() if not request.alone}
    if requests[prompts[0].key].alone:
        yield prompts[:1], {}
        yield [_progress(request) for request in shared.values() if request.granted], shared
    else:
        yield list(takewhile(lambda prompt: not requests[prompt.key].alone, prompts)), shared
    for request in started.values():
        if request.alone and request.granted:
            yield [_progress(request)], {}


def _progress(request: PrefillRequest) -> Progress:
    return Progress(request.key, request.done, request.goal)


def fill(
    own: Identity, budget: int, prompts: list[Progress], requests: Requests, started: Requests, slots: Spare
) -> list[Span]:
    """Return the next chunk, of up to `budget` tokens. When a request must wait for slots, the requests behind it wait
    too, except granted ones: the decode instance has memory for their KV, so their slots come back."""
    spans = CHUNKS[own.rules.chunk](prompts, budget)
    chosen = _within(spans, requests, slots, budget, own)
    if len(chosen) == len(spans) or not any(request.granted for request in started.values()):
        return chosen
    first = {span.key for span in chosen}
    overtaking = [_progress(request) for key, request in started.items() if key in first or request.granted]
    unstarted = [prompt for prompt in prompts[: len(chosen)] if prompt.key not in started]
    again = CHUNKS[own.rules.chunk]((overtaking + unstarted)[: own.capacity.max_batch], budget)
    return _within(again, requests, slots, budget, own)


def _within(spans: list[Span], requests: Requests, slots: Spare, budget: int, own: Identity) -> list[Span]:
    """Return the leading spans whose KV the free `slots` can hold; the rest waits until earlier KV has left.

    When the engine preempts decodes, it may use their tokens for more of a prompt than planned: up to the full chunk
    size instead of `budget`. The slots must suffice for that too."""
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
    """Return whether the engine ran the planned spans. `strained`: it may have run more or fewer tokens of each prompt,
    or none, but no other prompt."""
    left = {span.key: span for span in planned}
    for span in spans:
        wanted = left.pop(span.key, None)
        if wanted is None:
            return False
        resized = strained and wanted.start == span.start < span.stop <= requests[span.key].goal
        if span != wanted and not resized:
            return False
    return strained or not left
