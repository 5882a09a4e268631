"""The contract of a KV store: the sender puts, the receiver takes its own copy, the sender frees. The unit is
the KV block, opaque bytes; slots are one block each, so a slab cannot fragment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from tetri.wire.messages import Handle


class KVError(RuntimeError):
    """A slab cannot be made or reached; one line that says what to do."""


class KVLost(KVError):
    """The blocks are no longer what the handle says: slot reused, segment gone."""


class KVCorrupt(KVError):
    """The copy's digest is not the one announced."""


class KVStore(Protocol):
    transport: str
    slots: int

    @property
    def free_slots(self) -> int: ...

    def put(self, count: int, write: Callable[[Sequence[memoryview]], None]) -> tuple[Handle, int | None]:
        """Take `count` slots, let `write` fill one view each, return the handle and the xxh3-64 digest over the
        blocks in order (None: made without digests). Raises KVError when there are too few free slots (the core
        counts them: a bug)."""

    def take(self, handle: Handle, digest: int | None) -> Sequence[memoryview]:
        """The receiver's own copy, one view per block, digest (if there is one) checked over that copy and the
        generations read again after it; valid until the next take. Raises KVLost or KVCorrupt."""

    def free(self, handle: Handle) -> None:
        """Give the slots back and bump their generation. Freeing twice is an error (KVError)."""

    def forget(self, segment: str) -> None:
        """Close the mapping of a peer's segment, if there is one."""

    def close(self) -> None:
        """Unlink the own slab, unmap the peers'."""
