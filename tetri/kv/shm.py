"""The path `shm`, between processes of one host: each owns a segment in shared memory and maps its peers' read-only."""

from __future__ import annotations

import os
from collections.abc import Sequence

from tetri.instance import Reach
from tetri.kv.base import Wanted
from tetri.kv.mapped import MappingReader
from tetri.kv.segment import Mapping, attach, create, sweep
from tetri.kv.slab import HostSlab
from tetri.kv.staging import Staging

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
            self._own.unlink(self._path)
            self._own.close()

    def counters(self) -> dict[str, int]:
        """As in `Slab`."""
        return self._own.counters()


class ShmReader(MappingReader[Mapping]):
    """Reader of the path `shm`. Maps a peer's segment at the first fetch. `staging`: expected bytes of a KV chunk; the
    first fetch of a larger one is slower."""

    def __init__(self, deployment: str, staging: int, directory: str = DIRECTORY) -> None:
        super().__init__()
        self._deployment, self._directory = deployment, directory
        self._staging = Staging(staging)

    def map(self, reach: Reach) -> Mapping:
        return attach(self._directory, self._deployment, reach.segment, reach.process)

    def unmap(self, opened: Mapping) -> None:
        opened.close()

    def copy(self, wanted: Wanted) -> Sequence[memoryview]:
        return self._staging.fetch(self.opened(wanted.peer).segment, wanted.handle, wanted.digest)
