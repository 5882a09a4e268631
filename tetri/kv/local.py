"""The path `local`, between stores of one process: a mixed worker's own slab, tests, two engines in one program."""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Sequence
from typing import ClassVar

from tetri.kv.base import KVForeign, Wanted
from tetri.kv.mapped import CopyingReader
from tetri.kv.slab import FIRST_GENERATION, MARK, HostSlab, Segment
from tetri.kv.staging import Staging

Peers = dict[str, Segment]


class LocalSlab(HostSlab):
    """A slab in this process's memory, readable by every LocalReader with the same `peers` (default: one dict for the
    process)."""

    process: ClassVar[Peers] = {}

    def __init__(self, iid: str, slots: int, block_bytes: int, peers: Peers | None = None, digest: bool = True) -> None:
        self._neighbours = self.process if peers is None else peers
        segment = Segment(
            name=f"{iid}-{secrets.token_hex(8)}",
            slots=slots,
            block_bytes=block_bytes,
            generations=memoryview(array("Q", [FIRST_GENERATION]) * slots),
            blocks=memoryview(bytearray(slots * block_bytes)),
            marks=memoryview(bytearray(slots * MARK.size)),
        )
        super().__init__(segment, digest)
        self._neighbours[segment.name] = segment

    def close(self) -> None:
        """Make later fetches from this slab fail. A second call does nothing."""
        super().close()
        self._neighbours.pop(self.segment.name, None)


class LocalReader(CopyingReader):
    """Reads every slab in `peers`."""

    def __init__(self, peers: Peers | None = None) -> None:
        self._neighbours = LocalSlab.process if peers is None else peers
        self._staging = Staging(0)

    def copy(self, wanted: Wanted) -> Sequence[memoryview]:
        segment = self._neighbours.get(wanted.handle.segment)
        if segment is None:
            raise KVForeign(f"no segment {wanted.handle.segment[:80]!r} in this process")
        return self._staging.fetch(segment, wanted.handle, wanted.digest)
