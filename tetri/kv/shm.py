"""The path `shm`, between processes of one host: each owns a segment in shared memory and maps its peers' read-only."""

from __future__ import annotations

import os
from collections.abc import Iterable

from tetri.kv.base import Fetched, KVError, KVLost, Wanted
from tetri.kv.segment import Mapping, attach, create, sweep
from tetri.kv.slab import HostSlab
from tetri.kv.staging import Staging
from tetri.request import Reach

__all__ = ["ShmReader", "ShmSlab", "sweep"]
DIRECTORY = "/dev/shm"


class ShmSlab(HostSlab):
    """`slots` blocks of `block_bytes` each in a segment of its own, with all pages populated. Raises KVError when
    memory is too small."""

    def __init__(
        self, deployment: str, iid: str, slots: int, block_bytes: int, directory: str = DIRECTORY, digest: bool = True
    ) -> None:
        self._own = create(directory, deployment, iid, slots, block_bytes)
        self._path = os.path.join(directory, self._own.segment.name)
        super().__init__(self._own.segment, digest)

    def close(self) -> None:
        """Unlink the segment. Peers' mappings stay readable. A later `put` raises KVError. A second call does
        nothing."""
        super().close()
        if self._own.descriptor >= 0:
            os.unlink(self._path)
            self._own.close()


class ShmReader:
    """Reader of the path `shm`. Maps a peer's segment at the first fetch. `staging`: expected bytes of a KV chunk; the
    first fetch of a larger one is slower."""

    def __init__(self, deployment: str, staging: int, directory: str = DIRECTORY) -> None:
        self._deployment, self._directory = deployment, directory
        self._segments: dict[str, str] = {}  # peer -> the name of its segment
        self._mappings: dict[str, Mapping] = {}  # by peer
        self._staging = Staging(staging)

    def meet(self, peer: str, reach: Reach) -> None:
        if self._segments.get(peer) != reach.segment:
            self.part(peer)
            self._segments[peer] = reach.segment

    def part(self, peer: str) -> None:
        self._segments.pop(peer, None)
        mapping = self._mappings.pop(peer, None)
        if mapping is not None:
            mapping.close()

    def fetch(self, wanted: Wanted) -> Fetched:
        try:
            segment = self._mapping(wanted).segment
            return Fetched(wanted.ticket, self._staging.fetch(segment, wanted.handle, wanted.digest))
        except KVError as problem:
            return Fetched(wanted.ticket, problem=problem)

    def _mapping(self, wanted: Wanted) -> Mapping:
        known = self._segments.get(wanted.peer)
        if known is None:
            raise KVLost(f"no peer {wanted.peer} is known here")
        if wanted.peer not in self._mappings:
            self._mappings[wanted.peer] = attach(self._directory, self._deployment, known)
        return self._mappings[wanted.peer]

    def fetched(self) -> Iterable[Fetched]:
        return ()

    def close(self) -> None:
        """Unmap all segments."""
        for peer in list(self._segments):
            self.part(peer)
