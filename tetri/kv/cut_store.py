"""Wraps a KV store whose reads fail for a while, as on a worker without descriptors or memory, or behind a cut path."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

from tetri.faults import Cut
from tetri.kv.base import Fetched, KVCorrupt, KVLost, KVStore, Wanted
from tetri.kv.delayed import DelayedStore


class CutStore(DelayedStore):
    """`store` of the worker `iid`, with `cuts`. Their seconds count from now on; `file` is the path of their file.
    `clock`: seconds. The counter `injected_cut` counts the reads that failed."""

    def __init__(
        self, store: KVStore, cuts: Sequence[Cut], iid: str, file: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(store, clock)
        self.counters = self._counted
        self.cuts, self.iid, self.file = cuts, iid, file
        self.put = store.put
        self._began, self._failed = clock(), 0

    def fetch(self, wanted: Wanted) -> Fetched | None:
        now, file = self.clock() - self._began, os.path.exists(self.file)
        cut = next((cut for cut in self.cuts if cut.applies(self.iid, wanted.peer, now, file)), None)
        if cut is None:
            return self.store.fetch(wanted)
        self._failed += 1
        kind = KVCorrupt if cut.flips else KVLost
        return Fetched(wanted.ticket, problem=kind(f"{wanted.peer}: cannot be read: an injected fault"))

    def _counted(self) -> dict[str, int]:
        return {**self.store.counters(), "injected_cut": self._failed}
