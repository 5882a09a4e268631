"""Readers that copy a chunk while the caller waits: what the paths `shm`, `cuda_ipc` and `local` share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar

from tetri.instance import Reach
from tetri.kv.base import Block, Fetched, KVError, KVLost, Wanted

Opened = TypeVar("Opened")


class CopyingReader(ABC):
    """Implements `Reader` of base.py for slabs that need no opening."""

    @abstractmethod
    def copy(self, wanted: Wanted) -> Sequence[Block]:
        """Return the copied blocks. Raises KVError."""

    def meet(self, peer: str, reach: Reach) -> None:  # noqa: B027  # a reader that opens nothing needs no more
        """Does nothing."""

    def part(self, peer: str) -> None:  # noqa: B027
        """Does nothing."""

    def fetch(self, wanted: Wanted) -> Fetched | None:
        """Blocks until the copy is done."""
        return self.copied(wanted)

    def copied(self, wanted: Wanted) -> Fetched:
        """The result of `copy`: the blocks, or its KVError as the problem."""
        try:
            return Fetched(wanted.ticket, self.copy(wanted))
        except KVError as problem:
            return Fetched(wanted.ticket, problem=problem)

    def fetched(self) -> Iterable[Fetched]:
        """Always empty, because `fetch` is synchronous."""
        return ()

    def close(self) -> None:  # noqa: B027
        """Does nothing."""


class MappingReader(CopyingReader, Generic[Opened]):
    """As CopyingReader, for slabs that are opened at the first fetch. `map` opens a slab and `unmap` closes it."""

    def __init__(self) -> None:
        self._reaches: dict[str, Reach] = {}  # by peer
        self._opened: dict[str, Opened] = {}  # by peer

    @abstractmethod
    def map(self, reach: Reach) -> Opened:
        """Open a peer's slab. Raises KVLost."""

    @abstractmethod
    def unmap(self, opened: Opened) -> None:
        """Close a slab."""

    def meet(self, peer: str, reach: Reach) -> None:
        known = self._reaches.get(peer)
        if known is None or known.segment != reach.segment:
            self.part(peer)
            self._reaches[peer] = reach

    def part(self, peer: str) -> None:
        self._reaches.pop(peer, None)
        self.shut(peer)

    def shut(self, peer: str) -> None:
        """Close the peer's slab, if it is open."""
        if peer in self._opened:
            self.unmap(self._opened.pop(peer))

    def reach(self, peer: str) -> Reach:
        """What `meet` registered. Raises KVLost for an unknown peer."""
        if peer not in self._reaches:
            raise KVLost(f"no peer {peer} is known here")
        return self._reaches[peer]

    def opened(self, peer: str) -> Opened:
        """The peer's slab, opened now if it was not. Raises KVLost."""
        reach = self.reach(peer)
        if peer not in self._opened:
            self._opened[peer] = self.map(reach)
        return self._opened[peer]

    def close(self) -> None:
        """Close all slabs."""
        for peer in list(self._reaches):
            self.part(peer)
