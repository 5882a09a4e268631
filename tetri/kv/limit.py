"""A slower link than there is: any KV store, whose takes are carried out when their bytes would have come over it.

A link is the receiver's: what a worker takes from others comes one transfer after the other, as through its one network
card, whoever sends. A sender's own card is not emulated. The simulator's links are the same (sim/links.py).
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
    """A link of `bytes_s`, whose bytes arrive `latency_s` after they were sent."""

    def __init__(self, bytes_s: float, latency_s: float = 0.0) -> None:
        self.bytes_s, self.latency_s = bytes_s, latency_s
        self._busy_until = -inf

    def arrival(self, size: int, now: float) -> float:
        """When the last of `size` bytes is there that are asked for `now`, after all that was asked for before."""
        self._busy_until = max(self._busy_until, now) + size / self.bytes_s
        return self._busy_until + self.latency_s


class LimitedStore:
    """`store`, of blocks of `block_bytes`, behind `link`. Never sleeps: `due` says when the next transfer has come.
    What a worker takes from itself crosses no link."""

    def __init__(
        self, store: KVStore, link: LimitedLink, block_bytes: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.store, self.link, self.block_bytes, self.clock = store, link, block_bytes, clock
        self.slots, self.reach = store.slots, store.reach
        self.put, self.free, self.freed, self.meet = store.put, store.free, store.freed, store.meet
        self._coming: deque[tuple[float, Wanted]] = deque()  # by when they are there
        self._lost: list[Fetched] = []  # to be told

    @property
    def free_slots(self) -> int:
        return self.store.free_slots

    def fetch(self, wanted: Wanted) -> Fetched | None:
        # What cannot be right is refused by the store, and must not keep the link busy until then: blocks of another
        # size, a slot that is named twice.
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
