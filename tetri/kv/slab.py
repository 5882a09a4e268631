"""Slots of one block each in some memory: what every store that copies through memory has in common.

The owner writes, readers only read, and nobody locks. A reader sees by the slot's generation that the owner
has given the slot to something else: the owner counts it up *before* the slot can be written again, the
reader looks before its copy and after it. The digest over the copy is the last word.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from xxhash import xxh3_64

from tetri.kv.base import KVCorrupt, KVError, KVLost
from tetri.wire.messages import Handle

FIRST_GENERATION = 1
_PIECE = 256 << 10  # bytes copied and then digested while a core's own cache still has them: a quarter faster


@dataclass(frozen=True, slots=True)
class Segment:
    """Memory of `slots` blocks. `generations` is a view of u64, one a slot; `blocks` one of bytes."""

    name: str
    slots: int
    block_bytes: int
    generations: memoryview
    blocks: memoryview

    def block(self, slot: int) -> memoryview:
        return self.blocks[slot * self.block_bytes : (slot + 1) * self.block_bytes]

    def release(self) -> None:
        """Let go of the memory, so that what it belongs to can be closed."""
        self.generations.release()
        self.blocks.release()


class Slab:
    """The owner's side of a segment: which slots are free, and in which generation each is."""

    def __init__(self, segment: Segment, digest: bool = True) -> None:
        self.segment = segment
        self._digest = digest
        # The slot freed last is used first: its memory is the likeliest to be in a cache.
        self._free = list(range(segment.slots - 1, -1, -1))
        self._used = bytearray(segment.slots)

    @property
    def free_slots(self) -> int:
        return len(self._free)

    def put(self, count: int, write: Callable[[Sequence[memoryview]], None]) -> tuple[Handle, int | None]:
        """As KVStore.put. When `write` raises, the slots are free again and its error goes on."""
        if not 0 <= count <= len(self._free):
            raise KVError(f"{self.segment.name}: {count} slots asked, {len(self._free)} are free")
        slots = [self._free.pop() for _ in range(count)]
        for slot in slots:
            self._used[slot] = 1
        views = [self.segment.block(slot) for slot in slots]
        try:
            write(views)
        except BaseException:
            self._give_back(slots)
            raise
        digest = xxh3_64()
        for view in views if self._digest else ():
            digest.update(view)
        generations = [self.segment.generations[slot] for slot in slots]
        return Handle(
            segment=self.segment.name,
            slots=slots,
            generations=generations,
            block_bytes=self.segment.block_bytes,
        ), digest.intdigest() if self._digest else None

    def free(self, handle: Handle) -> None:
        """As KVStore.free; on an error nothing was freed."""
        problem = shape_problem(self.segment, handle)
        if problem is None and handle.segment != self.segment.name:
            problem = f"the handle is of {handle.segment[:80]!r}"
        if problem is not None:
            raise KVError(f"{self.segment.name}: cannot free: {problem}")
        for slot, generation in zip(handle.slots, handle.generations, strict=True):
            if not self._used[slot] or self.segment.generations[slot] != generation:
                raise KVError(f"{self.segment.name}: cannot free: slot {slot} was freed before")
        self._give_back(handle.slots)

    def _give_back(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self.segment.generations[slot] += 1
        for slot in slots:
            self._used[slot] = 0
            self._free.append(slot)


class Staging:
    """The receiver's own memory, reused by every take and grown when a chunk is larger than any before.
    Sized for `size` bytes at once, so that the first chunk does not wait for the kernel's page faults."""

    def __init__(self, size: int) -> None:
        self._memory = _touched(size)

    def take(self, segment: Segment, handle: Handle, digest: int | None) -> Sequence[memoryview]:
        """As KVStore.take, out of a segment whose slots the handle may or may not name rightly."""
        problem = shape_problem(segment, handle)
        if problem is not None:
            raise KVLost(f"{segment.name}: {problem}")
        _check_generations(segment, handle)
        size = segment.block_bytes
        if len(handle.slots) * size > len(self._memory):
            self._memory = _touched(len(handle.slots) * size)
        copies = [self._memory[at * size : (at + 1) * size] for at in range(len(handle.slots))]
        copied = xxh3_64()
        for copy, slot in zip(copies, handle.slots, strict=True):
            source = segment.block(slot)
            for start in range(0, size, _PIECE):
                piece = copy[start : start + _PIECE]
                piece[:] = source[start : start + _PIECE]
                if digest is not None:
                    copied.update(piece)
        _check_generations(segment, handle)
        if digest is not None and copied.intdigest() != digest:
            raise KVCorrupt(f"{segment.name}: digest {copied.intdigest():016x}, announced {digest:016x}")
        return copies


def shape_problem(segment: Segment, handle: Handle) -> str | None:
    """Why this handle cannot be of this segment, whatever the generations; None when it can."""
    if handle.block_bytes != segment.block_bytes:
        return f"blocks of {segment.block_bytes} bytes, the handle says {handle.block_bytes}"
    if len(handle.slots) != len(handle.generations):
        return f"the handle has {len(handle.slots)} slots and {len(handle.generations)} generations"
    if len(set(handle.slots)) != len(handle.slots):
        return "the handle names a slot twice"
    outside = next((slot for slot in handle.slots if not 0 <= slot < segment.slots), None)
    return None if outside is None else f"slot {outside} of {segment.slots}"


def _check_generations(segment: Segment, handle: Handle) -> None:
    for slot, generation in zip(handle.slots, handle.generations, strict=True):
        present = segment.generations[slot]
        if present != generation:
            raise KVLost(f"{segment.name}: slot {slot} is in generation {present}, not {generation}")


def _touched(size: int) -> memoryview:
    """Private memory of at least `size` bytes, every page of it already there."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    return memoryview(mmap.mmap(-1, max(size, 1), flags=flags))
