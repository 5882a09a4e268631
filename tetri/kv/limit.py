"""Emulates a slower link: wraps a KV store and delays each fetch until its bytes would have arrived over that link.

Each receiver has one link, like one network card: its fetches from all peers run one after the other. The sender's
card is not emulated. The simulator's links work the same way (sim/links.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from math import inf

from tetri.kv.base import Fetched, KVStore, Wanted
from tetri.kv.delayed import DelayedStore

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


class LimitedStore(DelayedStore):
    """`store`, with blocks of `block_bytes`, behind `link`: a fetch starts in the store when its chunk has arrived.
    Fetches over the path `local` do not use the link."""

    def __init__(
        self, store: KVStore, link: LimitedLink, block_bytes: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(store, clock)
        self.link, self.block_bytes = link, block_bytes
        self.put = store.put

    def fetch(self, wanted: Wanted) -> Fetched | None:
        # The store refuses an invalid handle (other block size, repeated slot). Such a fetch must not occupy the link.
        if wanted.path == "local" or wanted.handle.block_bytes != self.block_bytes:
            return self.store.fetch(wanted)
        size, now = len(set(wanted.handle.slots)) * self.block_bytes, self.clock()
        at = self.link.arrival(size, now)
        if at <= now:
            return self.store.fetch(wanted)
        self.late.append((at, wanted))
        return None
