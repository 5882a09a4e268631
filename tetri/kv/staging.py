"""Copies a KV chunk out of a mapped segment, with the checks of handle, generations and digest."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Sequence

from xxhash import xxh3_64

from tetri.kv.base import KVCorrupt, KVForeign, KVLost
from tetri.kv.slab import Segment, shape_problem
from tetri.wire.handover import Handle

_PIECE = 256 << 10  # bytes to copy and then digest while they are in the core's own cache: a quarter faster


class Staging:
    """The receiver's memory, reused by every fetch; it grows for a larger chunk. Populated for `size` bytes at once, so
    that the first fetch has no page faults."""

    def __init__(self, size: int) -> None:
        self._memory = populated(size)

    def fetch(self, segment: Segment, handle: Handle, digest: int | None) -> Sequence[memoryview]:
        """Copy the blocks of an unchecked `handle` out of `segment`. Raises KVForeign, KVLost or KVCorrupt."""
        check_handle(segment, handle)
        size = segment.block_bytes
        if len(handle.slots) * size > len(self._memory):
            self._memory = populated(len(handle.slots) * size)
        copies = [self._memory[at * size : (at + 1) * size] for at in range(len(handle.slots))]
        copied = xxh3_64()
        for copy, slot in zip(copies, handle.slots, strict=True):
            source = segment.block(slot)
            for start in range(0, size, _PIECE):
                piece = copy[start : start + _PIECE]
                piece[:] = source[start : start + _PIECE]
                if digest is not None:
                    copied.update(piece)
        check_generations(segment, handle)
        if digest is not None:
            check_digest(segment.name, copied.intdigest(), digest)
        return copies


def check_handle(segment: Segment, handle: Handle) -> None:
    """Raises KVForeign when the handle does not fit the segment, KVLost as `check_generations`."""
    problem = shape_problem(segment, handle)
    if problem is not None:
        raise KVForeign(f"{segment.name}: {problem}")
    check_generations(segment, handle)


def check_generations(segment: Segment, handle: Handle) -> None:
    """Raises KVLost when a slot has been reused since the handle was created."""
    compare_generations(segment.name, handle, [segment.generations[slot] for slot in handle.slots])


def compare_generations(name: str, handle: Handle, present: Iterable[int]) -> None:
    """Raises KVLost unless the slots of segment `name` have the handle's generations. `present`: those that they
    have."""
    for slot, found, generation in zip(handle.slots, present, handle.generations, strict=True):
        if found != generation:
            raise KVLost(f"{name}: slot {slot} is in generation {found}, not {generation}")


def check_digest(name: str, copied: int, announced: int) -> None:
    """Raises KVCorrupt when the digest of the copy differs from the announced one."""
    if copied != announced:
        raise KVCorrupt(f"{name}: digest {copied:016x}, announced {announced:016x}")


def populated(size: int) -> memoryview:
    """Private memory of at least `size` bytes, with all pages populated. Raises KVLost when there is not enough."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    try:
        return memoryview(mmap.mmap(-1, max(size, 1), flags=flags))
    except OSError as error:
        raise KVLost(f"cannot get {size} bytes of memory for KV that arrives ({error.strerror})") from None
