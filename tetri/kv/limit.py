"""Emulates a slower link: wraps a KV store and delays each fetch until its bytes would have arrived over that link.

Each receiver has one link, like one network card: its fetches from all peers run one after the other. The sender's
card is not emulated. The simulator's links work the same way (sim/links.py).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from math import inf

from tetri.kv.base import Fetched, KVLost, KVStore, Wanted

# Bytes a second of the paper's two settings (section 4.1): 200 Gb/s from NIC to NIC, 300 GB/s from GPU to GPU.
LINKS = {"roce-200g": 25e9, "nvlink": 300e9}


class LimitedLink:
    """A link with a rate of `bytes_s` bytes a second and a latency of `latency_s` seconds."""

    def __init__(self, bytes_s: float, latency_s: float = 0.0) -> None:
        self.bytes_s, self.latency_s = bytes_s, latency_s
        self._busy_until = -inf

    def arrival(self, size: int, now: float) -> float:
        """Arrival time of the last of `size` bytes requested at `now`, behind all earlier requests. Seconds."""
        self._busy_until = max(self._busy_until, now) + size / self.bytes_s
        return self._busy_until + self.latency_s


class LimitedStore:
    """`store`, with blocks of `block_bytes`, behind `link`. Never sleeps: `due` is the arrival time of the next chunk.
    Fetches over the path `local` do not use the link."""

    def __init__(
        self, store: KVStore, link: LimitedLink, block_bytes: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.store, self.link, self.block_bytes, self.clock = store, link, block_bytes, clock
        self.slots, self.reach = store.slots, store.reach
        self.put, self.free, self.freed, self.meet = store.put, store.free, store.freed, store.meet
        self._coming: deque[tuple[float, Wanted]] = deque()  # in the order of their arrival times
        self._lost: list[Fetched] = []  # results not yet returned

    @property
    def free_slots(self) -> int:
        """How many slots `put` can use now."""
        return self.store.free_slots

    def fetch(self, wanted: Wanted) -> Fetched | None:
        # The store refuses an invalid handle (other block size, repeated slot). Such a fetch must not occupy the link.
        if wanted.path == "local" or wanted.handle.block_bytes != self.block_bytes:
            return self.store.fetch(wanted)
        size, now = len(set(wanted.handle.slots)) * self.block_bytes, self.clock()
        at = self.link.arrival(size, now)
        if at <= now:
            return self.store.fetch(wanted)
        self._coming.append((at, wanted))
        return None

    def fetched(self) -> Iterator[Fetched]:
        lost, self._lost = self._lost, []
        yield from lost
        now = self.clock()
        while self._coming and self._coming[0][0] <= now:
            fetched = self.store.fetch(self._coming.popleft()[1])
            if fetched is not None:
                yield fetched
        yield from self.store.fetched()

    def due(self) -> float | None:
        mine = 0.0 if self._lost else self._coming[0][0] if self._coming else None
        theirs = self.store.due()
        return min((at for at in (mine, theirs) if at is not None), default=None)

    def part(self, peer: str) -> None:
        gone = [wanted for _, wanted in self._coming if wanted.peer == peer]
        self._coming = deque((at, wanted) for at, wanted in self._coming if wanted.peer != peer)
        self._lost += [Fetched(wanted.ticket, problem=KVLost(f"{peer} is gone")) for wanted in gone]
        self.store.part(peer)

    def close(self) -> None:
        self._coming.clear()
        self._lost.clear()
        self.store.close()
