"""The queue of a prefill instance: in which order prompts are computed, and how much work that is."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping
from itertools import islice

from tetri.core.actions import Broken
from tetri.core.instance.peers import Identity
from tetri.core.prefill.request import PrefillRequest
from tetri.policy.order import Rank
from tetri.policy.rules import ORDERS
from tetri.policy.views import QueuedPrompt


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
