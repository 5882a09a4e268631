"""A client with a thousand open streams, which stops reading; and what reading them costs tetri's own client."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import zmq

from tetri.bench import clients
from tetri.bench.report import BenchError
from tetri.bench.torture.case import Findings
from tetri.bench.torture.deployed import Deployed, deployed
from tetri.bench.torture.listener import Gaps, Listener
from tetri.wire.clients import Accepted, Delta, Done, Refused

STREAMS, FEW, TOKENS = 1000, 10, 60
STEP_S, BASE_S, STOPPED_S = 0.2, 3.0, 3.0
WAIT_S = 60.0
LARGE = (
    *("engine.max_batch=1024", "engine.chunk_tokens=4096"),
    *("emulated.blocks=16384", "emulated.context=8192", "transfer.slab_blocks=1024"),
)
#: Messages that the broker offers in vain to a client that does not read: those under way when its queue became full,
#: then one at a time, after pauses that double from 50 ms to 2 s. Offering all rows in each round would be thousands.
MOST_IN_VAIN = 30
DELTA_TOKENS, ROUNDS, MOST_US = 20, 3, clients.LIMIT_US


class Crowd:
    """One client with STREAMS requests, which reads when it is asked to. Messages are counted by kind, tokens by
    request."""

    def __init__(self, cluster: Deployed) -> None:
        self._context = zmq.Context[zmq.Socket[bytes]]()
        self._talker = clients.Talker(self._context, cluster.config.clients_address)
        self.kinds: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()

    def __enter__(self) -> Self:
        for number in range(STREAMS):
            self._talker.submit(f"k{number}", TOKENS)
            self.read()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._context.destroy(0)

    def read(self) -> None:
        """Read all that waits. Raises BenchError if a request was refused, or tokens are missing."""
        for message in self._talker.read():
            self.kinds[type(message).__name__] += 1
            if isinstance(message, Refused):
                raise BenchError(f"refused: {message.reason}")
            if isinstance(message, Delta) and message.ids:
                if message.start != self.tokens[message.rid]:
                    raise BenchError(f"tokens {self.tokens[message.rid]} to {message.start} of a stream are missing")
                self.tokens[message.rid] += len(message.ids)

    def read_until(self, enough: Callable[[], bool], what: str) -> None:
        """Go on reading. Raises BenchError when it takes too long."""
        until = time.monotonic() + WAIT_S
        while not enough():
            self.read()
            if time.monotonic() > until:
                raise BenchError(f"{what}: {dict(self.kinds)}, {len(self.tokens)} streams have tokens")
            time.sleep(0.002)

    def read_for(self, seconds: float) -> None:
        """Go on reading for so long."""
        until = time.monotonic() + seconds
        self.read_until(lambda: time.monotonic() >= until, "never happens")


def stopped_reader(folder: Path, found: Findings) -> None:
    """1,000 streams of one client, which reads, then stops until the broker cannot send it anything more, and then
    reads on: others notice nothing, and it gets everything."""
    with deployed(folder, found, LARGE, decode_s=STEP_S) as cluster, Listener(cluster.config, 2) as listener:
        with Crowd(cluster) as crowd:
            crowd.read_until(lambda: len(crowd.tokens) == STREAMS, "not all streams began")
            gaps = Gaps(listener, found, lambda: crowd.read_for(BASE_S))
            start, before = time.monotonic(), cluster.counter("net_replies_full")
            while cluster.counter("net_replies_full") == before:
                time.sleep(0.1)
                if time.monotonic() > start + WAIT_S:
                    raise BenchError("the broker could always send")
            found.note("full_after_s", round(time.monotonic() - start, 1))
            time.sleep(STOPPED_S)
            gaps.judge()
            found.at_most("offered_in_vain", cluster.counter("net_replies_full") - before, MOST_IN_VAIN)
            crowd.read_until(lambda: crowd.kinds["Done"] == STREAMS, "not all streams ended")
        found.exactly("accepted", crowd.kinds[Accepted.__name__], STREAMS)
        found.exactly("ended", crowd.kinds[Done.__name__], STREAMS)
        found.exactly("incomplete", sum(count != TOKENS for count in crowd.tokens.values()), 0)


def client_cost(folder: Path, found: Findings) -> None:
    """A Delta costs a client with 1,000 open streams about as much as one with ten."""
    for kind in clients.KINDS:
        name = kind.replace(", ", "_").replace(" ", "_")
        found.note(f"{name}_few_us", _delta_us(kind, FEW, DELTA_TOKENS * STREAMS // FEW))
        found.at_most(f"{name}_us", _delta_us(kind, STREAMS, DELTA_TOKENS), MOST_US)


def _delta_us(kind: str, streams: int, tokens: int) -> float:
    """The least of some rounds, since other work on the same core makes one slower."""
    return round(min(clients.delta_us(kind, streams, tokens) for _ in range(ROUNDS)), 2)
