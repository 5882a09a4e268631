"""A client that wants its tokens in time, and must not notice what happens to others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from types import TracebackType
from typing import Self

from tetri.bench.deployment import polled
from tetri.bench.overhead.live import Talk
from tetri.bench.report import BenchError, spread
from tetri.bench.torture.case import ADDED_GAP_MS, Findings
from tetri.client.connection import Connection
from tetri.config import Config
from tetri.engine.emulated import reference
from tetri.request import Sampling, token_ids

PROMPT, TOKENS = 20, 6000  # of each stream; more tokens than a case has time for
START_S, POLL_S = 60.0, 0.01


class Listener:
    """Open streams of one client, read by a thread of its own. All requests are there when the context is entered."""

    def __init__(self, config: Config, streams: int = 4) -> None:
        self._config = config
        self._prompts = [[1000 + number] * PROMPT for number in range(streams)]
        self._connection = Connection(config.clients_address)
        self._talk = Talk(self._connection)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="listener", daemon=True)

    def __enter__(self) -> Self:
        for prompt in self._prompts:
            self._talk.ask(prompt, TOKENS)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        self._connection.close()

    def _listen(self) -> None:
        talk = self._talk
        while not self._ended.is_set():
            talk.turn()

    def wait_for_tokens(self, more: int) -> None:
        """Wait until each stream has so many more tokens. Raises BenchError when that lasts too long, or one ends."""
        wanted = [len(times) + more for times in self._talk.arrivals]

        def enough(counts: list[int]) -> bool:
            return all(count >= least for count, least in zip(counts, wanted, strict=True)) or self.lost() > 0

        counts = polled(lambda: [len(times) for times in self._talk.arrivals], enough, START_S, POLL_S)
        if not enough(counts) or self.lost():
            raise BenchError(f"a stream got no more tokens ({counts} of {wanted}, {self.lost()} have ended)")

    def lost(self) -> int:
        """Streams that have ended, which none should."""
        return sum(request.ended for request in self._talk.requests)

    def gaps_s(self, since: float, until: float) -> list[float]:
        """The gaps of all streams in this time, in seconds."""
        arrivals = [[*times] for times in self._talk.arrivals]  # the thread appends to them
        return [gap for times in arrivals for gap in gaps_s(times, since, until)]

    def wrong(self) -> int:
        """Streams whose tokens are not the right ones."""
        made, wrong = self._config.emulated, 0
        for prompt, request in zip(self._prompts, self._talk.requests, strict=True):
            ids = token_ids(request.choices[0].tokens)
            sampling = Sampling(max_tokens=max(1, len(ids)), ignore_eos=True)
            wrong += ids != reference(prompt, sampling, made.vocabulary, made.token_bytes)[: len(ids)]
        return wrong


def gaps_s(times: Sequence[float], since: float, until: float) -> list[float]:
    """The seconds between tokens that follow each other, for pairs whose second came from `since` to `until`, and from
    the last token until then: a stream that stops has one long gap."""
    known = [at for at in times if at <= until]
    gaps = [later - at for at, later in pairwise(known) if later > since]
    return [*gaps, until - max([*known[-1:], since])]


class Gaps:
    """Compares the gaps in a listener's streams during a fault with those of a time without it."""

    def __init__(self, listener: Listener, found: Findings, peace: Callable[[], None]) -> None:
        """`peace` lets some seconds go by without the fault."""
        self._listener, self._found = listener, found
        listener.wait_for_tokens(3)
        start = time.monotonic()
        peace()
        self._base = spread(listener.gaps_s(start, time.monotonic()), 1000, 1)
        self._since = time.monotonic()
        found.note("base_gap_ms", self._base)

    def judge(self) -> None:
        """Record the gaps from the end of the base line up to now, and what else the streams got."""
        gaps, found = spread(self._listener.gaps_s(self._since, time.monotonic()), 1000, 1), self._found
        found.note("gap_ms", gaps)
        found.at_most("worst_gap_ms", gaps["worst"], round(self._base["worst"] + ADDED_GAP_MS, 1))
        found.exactly("streams_lost", self._listener.lost(), 0)
        found.exactly("streams_wrong", self._listener.wrong(), 0)
