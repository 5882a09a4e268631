"""The store of one process: tests, the simulator's counterpart, and two engines in one program."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import ClassVar

from tetri.kv.base import KVLost
from tetri.kv.slab import FIRST_GENERATION, Segment, Slab, Staging
from tetri.wire.messages import Handle

Neighbours = dict[str, Segment]


class LocalStore:
    """Slots in this process's own memory. Stores see each other through the same `neighbours`, a dictionary
    by segment name; by default all stores of the process share one."""

    transport = "local"
    _process: ClassVar[Neighbours] = {}

    def __init__(
        self, iid: str, slots: int, block_bytes: int, neighbours: Neighbours | None = None, digest: bool = True
    ) -> None:
        self.slots = slots
        self._neighbours = self._process if neighbours is None else neighbours
        segment = Segment(
            name=f"{iid}-{secrets.token_hex(8)}",
            slots=slots,
            block_bytes=block_bytes,
            generations=memoryview(bytearray(8 * slots)).cast("Q"),
            blocks=memoryview(bytearray(slots * block_bytes)),
        )
        for slot in range(slots):
            segment.generations[slot] = FIRST_GENERATION
        self._slab = Slab(segment, digest)
        self._staging = Staging(0)
        self._neighbours[segment.name] = segment

    @property
    def free_slots(self) -> int:
        return self._slab.free_slots

    def put(self, count: int, write: Callable[[Sequence[memoryview]], None]) -> tuple[Handle, int | None]:
        return self._slab.put(count, write)

    def take(self, handle: Handle, digest: int | None) -> Sequence[memoryview]:
        segment = self._neighbours.get(handle.segment)
        if segment is None:
            raise KVLost(f"no segment {handle.segment[:80]!r} in this process")
        return self._staging.take(segment, handle, digest)

    def free(self, handle: Handle) -> None:
        self._slab.free(handle)

    def forget(self, segment: str) -> None:
        """Nothing is mapped, nothing to forget."""

    def close(self) -> None:
        """After it nobody can take from this store; a second call does nothing."""
        self._neighbours.pop(self._slab.segment.name, None)
