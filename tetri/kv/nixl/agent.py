"""nixl's agent: memory that may be read by others, and reads of theirs. All calls of an agent come from one thread, or
from one after the other: it is made without locks.

Of the library only the bindings are used. Its Python class fixes the delay of the progress thread at 0, and that thread
then burns a core for ever; and its descriptors cross processes as pickles, here they are addresses and lengths.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tetri.kv.base import KVError, KVLost

Span = tuple[int, int]  # address, bytes
_WHEELS = ("nixl_cu12", "nixl_cu13")
_PROGRESS_US = 100_000  # the progress thread wakes by events, and this often if none came


def installed() -> bool:
    return find_spec("nixl") is not None


def has_rdma() -> bool:
    """Whether this machine has a device that makes nixl worth its while: over plain TCP `stream` is as fast, and can be
    encrypted."""
    return any(Path("/sys/class/infiniband").glob("*"))


def library() -> Any:
    """The bindings. Raises KVError when there are none."""
    if not installed():
        raise KVError("the KV transport nixl needs the extra nixl: pip install 'tetri[nixl]', or set another transport")
    os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")  # otherwise it greets on standard output,
    os.environ.setdefault("UCX_LOG_FILE", "stderr")  # and UCX complains there
    # To find out which of its two wheels fits, `nixl` imports torch: a second and 200 MB in an emulated worker.
    wheels = [name for name in _WHEELS if find_spec(name) is not None]
    raising = logging.raiseExceptions
    try:
        return importlib.import_module(f"{wheels[0] if len(wheels) == 1 else 'nixl'}._bindings")
    except ImportError as error:
        raise KVError(f"the KV transport nixl cannot be loaded: {error}") from None
    finally:
        logging.raiseExceptions = raising  # the library turns it off for the whole process


def address(view: memoryview) -> int:
    """Where writable memory lies."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view)) if len(view) else 0


@contextmanager
def _defaults(settings: dict[str, str]) -> Iterator[None]:
    """In the environment, unless they are set there; afterwards it is as before."""
    added = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


@dataclass(frozen=True, slots=True)
class Region:
    """Memory that the agent knows."""

    view: memoryview  # of bytes
    address: int
    registration: Any


class PeerUnreachable(KVLost):
    """The connection to a peer, or the backend itself, is not what it should be."""


class Agent:
    """`name` must be unique among all agents that ever meet: one that comes back under an old name crashes its peers.
    Without `everywhere` it listens on the loopback device only, unless the environment says otherwise.
    Raises KVError."""

    def __init__(self, name: str, everywhere: bool) -> None:
        self._nixl = nixl = library()
        self._errors = tuple(getattr(nixl, name) for name in dir(nixl) if name.endswith("Error"))
        made = nixl.nixlAgentConfig()
        made.useProgThread, made.pthrDelay = True, _PROGRESS_US
        made.useListenThread, made.captureTelemetry = False, False
        made.syncMode = nixl.NIXL_THREAD_SYNC_NONE
        with (
            self._explained("cannot start its backend UCX"),
            _defaults({} if everywhere else {"UCX_NET_DEVICES": "lo"}),
        ):
            self._agent = nixl.nixlAgent(name, made)
            self._backends = [self._agent.createBackend("UCX", {})]

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            raise PeerUnreachable(f"nixl {what}: {error}") from None

    def allocate(self, size: int) -> Region:
        """Own memory, every page of it there."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
        return self.register(memoryview(mmap.mmap(-1, max(size, 1), flags=flags)))

    def register(self, view: memoryview) -> Region:
        """`view` must stay as it is until `close` or `unregister`."""
        at = address(view)
        wanted = self._nixl.nixlRegDList(self._nixl.DRAM_SEG, [(at, len(view), 0, "")])
        with self._explained(f"cannot register {len(view)} bytes"):
            self._agent.registerMem(wanted, self._backends)
        return Region(view, at, wanted)

    def unregister(self, region: Region) -> None:
        with self._explained("cannot let go of memory"):
            self._agent.deregisterMem(region.registration, self._backends)

    def metadata(self) -> bytes:
        """What another agent needs to read all that was registered so far; no pickle."""
        with self._explained("has no metadata"):
            data: bytes = self._agent.getLocalMD()
        return data

    def meet(self, name: str, metadata: bytes) -> None:
        """Raises Unreachable, also when the metadata is not of an agent of this name."""
        with self._explained(f"cannot reach {name}"):
            found = self._agent.loadRemoteMD(metadata).decode(errors="replace")
            if found != name:
                self._agent.invalidateRemoteMD(found)
                raise PeerUnreachable(f"nixl met {found[:80]!r} in the place of {name}")

    def part(self, name: str) -> None:
        """Only when no read from it is under way: what is under way goes on writing into the memory here."""
        try:
            self._agent.invalidateRemoteMD(name)
        except self._errors:
            pass  # it was never there, or has gone by itself

    def read(self, name: str, into: Sequence[Span], what: Sequence[Span]) -> int:
        """Begin to read; the read, for `ended` and `release`. Raises Unreachable."""
        nixl = self._nixl
        own = nixl.nixlXferDList(nixl.DRAM_SEG, [(at, size, 0) for at, size in into])
        theirs = nixl.nixlXferDList(nixl.DRAM_SEG, [(at, size, 0) for at, size in what])
        with self._explained(f"cannot read from {name}"):
            read: int = self._agent.createXferReq(nixl.NIXL_READ, own, theirs, name, b"", self._backends)
        try:
            with self._explained(f"cannot read from {name}"):
                self._agent.postXferReq(read, b"")
        except PeerUnreachable:
            self.release(read)
            raise
        return read

    def ended(self, read: int) -> bool:
        """Raises Unreachable when it has ended, but badly."""
        with self._explained("lost its peer"):
            return bool(self._agent.getXferStatus(read) == self._nixl.NIXL_SUCCESS)

    def release(self, read: int) -> None:
        """Of a read that has ended."""
        with self._explained("cannot release a read"):
            self._agent.releaseXferReq(read)

    def close(self) -> None:
        """Ends its threads. Before the registered memory is given back: the backend may be reading it for a peer."""
        self._agent = None
