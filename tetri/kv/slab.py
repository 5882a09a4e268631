"""The slab: slots of one KV block each in some memory. All stores share this code.

Only the owner writes, and readers take no lock. A slot's generation tells a reader whether the slot was reused: the
owner increments it *before* the slot can be written again, and the reader checks it before and after its copy. The
digest over the copy is the final check.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

from xxhash import xxh3_64

from tetri.kv.base import KVError, Write
from tetri.wire.handover import Handle

FIRST_GENERATION = 1
OWNER_BYTES = 56
MARK = struct.Struct(f"=Q{OWNER_BYTES}s")  # time of the put, CLOCK_MONOTONIC in ns, 0: unused; owner in UTF-8


def digest_of(blocks: Iterable[Any]) -> int:
    """xxh3-64 over the bytes of the blocks, in order."""
    digest = xxh3_64()
    for block in blocks:
        digest.update(block)
    return digest.intdigest()


@dataclass(frozen=True, slots=True)
class Segment:
    """Memory of `slots` blocks. `generations`: view of one u64 for each slot; `blocks`: view of bytes; `marks`: one
    MARK for each slot, or empty where no survey looks."""

    name: str
    slots: int
    block_bytes: int
    generations: memoryview
    blocks: memoryview
    marks: memoryview = memoryview(b"")

    def block(self, slot: int) -> memoryview:
        """The `block_bytes` bytes of a slot."""
        return self.blocks[slot * self.block_bytes : (slot + 1) * self.block_bytes]

    def release(self) -> None:
        """Release the views, so that the memory's owner can close it."""
        self.generations.release()
        self.blocks.release()
        self.marks.release()


class HostSlab:
    """The owner's side of a segment in host memory (implements `Slab` of base.py). Marks each used slot with owner and
    time, for survey.py."""

    def __init__(self, segment: Segment, digest: bool = True) -> None:
        self.segment, self.slots = segment, segment.slots
        self._digest = digest
        # The slot freed last is used first: its memory is the likeliest to be cached.
        self._free = list(range(segment.slots - 1, -1, -1))
        self._owned = bytearray(segment.slots)  # 1: owned by a request
        self._kept = [0] * segment.slots  # number of `keep` without `let_go`
        self._freed = 0
        self._closed = False
        self._lock = Lock()

    @property
    def free_slots(self) -> int:
        """How many slots `put` can use now."""
        return len(self._free)

    def put(self, count: int, write: Write, owner: str = "") -> tuple[Handle, int | None]:
        """As in `Slab`. When `write` raises, the slots are freed and the exception propagates."""
        with self._lock:
            if self._closed:
                raise KVError(f"{self.segment.name}: is closed")
            if not 0 <= count <= len(self._free):
                raise KVError(f"{self.segment.name}: {count} slots asked, {len(self._free)} are free")
            slots = [self._free.pop() for _ in range(count)]
            for slot in slots:
                self._owned[slot] = 1
        _mark(self.segment, slots, owner)
        try:
            digest = self._fill(slots, write)
        except BaseException:
            with self._lock:
                self._release(slots)
                self._freed -= len(slots)  # the caller never counted them as used
            raise
        generations = [self.segment.generations[slot] for slot in slots]
        handle = Handle(
            segment=self.segment.name, slots=slots, generations=generations, block_bytes=self.segment.block_bytes
        )
        return handle, digest

    def _fill(self, slots: Sequence[int], write: Write) -> int | None:
        """Let `write` fill the blocks of these slots; returns the digest over them."""
        views = [self.segment.block(slot) for slot in slots]
        write(views)
        return digest_of(views) if self._digest else None

    def free(self, handle: Handle) -> None:
        """As in `Slab`. On an error no slot is freed."""
        with self._lock:
            problem = self._not_held(handle)
            if problem is not None:
                raise KVError(f"{self.segment.name}: cannot free: {problem}")
            self._release(handle.slots)

    def _not_held(self, handle: Handle) -> str | None:
        """Why no request owns the handle's slots; None when one does."""
        if self._closed:
            return "it is closed"
        problem = shape_problem(self.segment, handle)
        if problem is not None:
            return problem
        for slot, generation in zip(handle.slots, handle.generations, strict=True):
            if not self._owned[slot] or self.segment.generations[slot] != generation:
                return f"slot {slot} was freed before"
        return None

    def _release(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self.segment.generations[slot] += 1
        for slot in slots:
            self._owned[slot] = 0
            self._recycle(slot)

    def _recycle(self, slot: int) -> None:
        if not self._owned[slot] and not self._kept[slot]:
            if not self._closed and self.segment.marks:
                MARK.pack_into(self.segment.marks, slot * MARK.size, 0, b"")
            self._free.append(slot)
            self._freed += 1

    def freed(self) -> int:
        with self._lock:
            count, self._freed = self._freed, 0
        return count

    def keep(self, handle: Handle) -> bool:
        with self._lock:
            if self._not_held(handle) is not None:
                return False
            for slot in handle.slots:
                self._kept[slot] += 1
        return True

    def let_go(self, handle: Handle) -> int:
        """As in `Slab`. Raises KVError, and changes nothing, when one of the slots is not kept."""
        with self._lock:
            problem = shape_problem(self.segment, handle)
            if problem is not None or not all(self._kept[slot] for slot in handle.slots):
                raise KVError(f"{self.segment.name}: cannot let go: {problem or 'a slot is not kept'}")
            free = len(self._free)
            for slot in handle.slots:
                self._kept[slot] -= 1
                self._recycle(slot)
            return len(self._free) - free

    def counters(self) -> dict[str, int]:
        """As in `Slab`."""
        return {}

    def close(self) -> None:
        """Refuse `put`, `free` and `keep` from now on. Does not free the memory. A second call does nothing."""
        with self._lock:
            self._closed = True


def _mark(segment: Segment, slots: Sequence[int], owner: str) -> None:
    if segment.marks:
        name, now = owner.encode(errors="replace")[:OWNER_BYTES], time.monotonic_ns()
        for slot in slots:
            MARK.pack_into(segment.marks, slot * MARK.size, now, name)


def shape_problem(segment: Segment, handle: Handle) -> str | None:
    """Why the handle does not fit the segment, regardless of generations; None when it fits."""
    if handle.segment != segment.name:
        return f"the handle is of {handle.segment[:80]!r}"
    if handle.block_bytes != segment.block_bytes:
        return f"blocks of {segment.block_bytes} bytes, the handle says {handle.block_bytes}"
    if len(handle.slots) != len(handle.generations):
        return f"the handle has {len(handle.slots)} slots and {len(handle.generations)} generations"
    if len(set(handle.slots)) != len(handle.slots):
        return "the handle names a slot twice"
    outside = next((slot for slot in handle.slots if not 0 <= slot < segment.slots), None)
    return None if outside is None else f"slot {outside} of {segment.slots}"
