"""The store of processes on one host: each owns a segment in shared memory and maps its peers' read-only."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from tetri.kv.segment import Mapping, attach, create, sweep
from tetri.kv.slab import Slab, Staging
from tetri.wire.messages import Handle

__all__ = ["ShmStore", "sweep"]


class ShmStore:
    """`slots` blocks of `block_bytes` each for chunks on their way out; nothing is mapped twice."""

    transport = "shm"

    def __init__(
        self,
        deployment: str,
        iid: str,
        slots: int,
        block_bytes: int,
        directory: str = "/dev/shm",
        staging: int = 4,
        digest: bool = True,
    ) -> None:
        """All memory is there when this returns: KVError when it does not fit. `staging` is how many blocks a
        chunk from a peer is expected to have; a larger one only makes its first take slower."""
        self.slots = slots
        self._deployment = deployment
        self._directory = directory
        self._own = create(directory, deployment, iid, slots, block_bytes)
        self._slab = Slab(self._own.segment, digest)
        self._peers: dict[str, Mapping] = {}
        self._staging = Staging(staging * block_bytes)

    @property
    def segment(self) -> str:
        """The name of the own segment, unique to this start of this process."""
        return self._own.segment.name

    @property
    def free_slots(self) -> int:
        return self._slab.free_slots

    def put(self, count: int, write: Callable[[Sequence[memoryview]], None]) -> tuple[Handle, int | None]:
        """As KVStore.put. `write` must not keep the views: the slots get another content after `free`."""
        return self._slab.put(count, write)

    def take(self, handle: Handle, digest: int | None) -> Sequence[memoryview]:
        return self._staging.take(self._mapping(handle.segment).segment, handle, digest)

    def _mapping(self, name: str) -> Mapping:
        if name == self.segment:
            return self._own
        if name not in self._peers:
            mapping = attach(self._directory, self._deployment, name)
            # A peer's new segment means that it was restarted: the old one would keep its memory for ever.
            for old in [old for old in self._peers if _owner(old) == _owner(name)]:
                self.forget(old)
            self._peers[name] = mapping
        return self._peers[name]

    def free(self, handle: Handle) -> None:
        self._slab.free(handle)

    def forget(self, segment: str) -> None:
        mapping = self._peers.pop(segment, None)
        if mapping is not None:
            mapping.close()

    def close(self) -> None:
        """Unlink the own segment, unmap all. What peers have mapped stays readable for them. A second call
        does nothing; putting and taking afterwards is an error."""
        for name in list(self._peers):
            self.forget(name)
        if self._own.descriptor >= 0:
            os.unlink(os.path.join(self._directory, self.segment))
            self._own.close()


def _owner(segment: str) -> str:
    return segment.rpartition("-")[0]
