"""Wraps a nixl agent: registers memory for peers to read, and reads the memory of peers. The agent has no locks, so its
calls must not overlap.

Only nixl's bindings are used, not its Python class: that class sets the delay of the progress thread to 0, which keeps
one core busy, and it pickles descriptors. Here a descriptor is an address and a length.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tetri.kv.base import KVError, KVLost
from tetri.kv.staging import populated

Span = tuple[int, int]  # address, bytes
_WHEELS = ("nixl_cu12", "nixl_cu13")
_PROGRESS_US = 100_000  # the progress thread wakes on events, and at least this often


def installed() -> bool:
    """Whether nixl is installed."""
    return find_spec("nixl") is not None


def has_rdma() -> bool:
    """Whether this machine has an RDMA device. Without one `stream` is as fast as nixl, and is encrypted."""
    return any(Path("/sys/class/infiniband").glob("*"))


def library() -> Any:
    """nixl's bindings. Raises KVError when they are not installed or cannot be loaded."""
    if not installed():
        raise KVError("the KV transport nixl needs the extra nixl: pip install 'tetri[nixl]', or set another transport")
    os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")  # nixl and UCX log to standard output otherwise
    os.environ.setdefault("UCX_LOG_FILE", "stderr")
    # `nixl` imports torch to choose between its two wheels: one second and 200 MB in an emulated worker.
    wheels = [name for name in _WHEELS if find_spec(name) is not None]
    raising = logging.raiseExceptions
    try:
        return importlib.import_module(f"{wheels[0] if len(wheels) == 1 else 'nixl'}._bindings")
    except ImportError as error:
        raise KVError(f"the KV transport nixl cannot be loaded: {error}") from None
    finally:
        logging.raiseExceptions = raising  # the library turns it off for the whole process


def address(view: memoryview) -> int:
    """Address of writable memory; 0 for an empty view."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view)) if len(view) else 0


@contextmanager
def _defaults(settings: dict[str, str]) -> Iterator[None]:
    """Set environment variables that are not set yet, for the duration of the block."""
    added = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


@dataclass(frozen=True, slots=True)
class Region:
    """Memory registered with the agent."""

    view: memoryview  # of bytes
    address: int
    registration: Any


class PeerUnreachable(KVLost):
    """The connection to the peer, or the backend, has failed."""


class Agent:
    """A nixl agent with the UCX backend. `name` must be unique among all agents, also over time: an agent that returns
    under an old name crashes its peers. Without `everywhere` it listens on loopback only, unless UCX_NET_DEVICES is
    set. Raises KVError."""

    def __init__(self, name: str, everywhere: bool) -> None:
        self._nixl = nixl = library()
        self._errors = tuple(getattr(nixl, name) for name in dir(nixl) if name.endswith("Error"))
        config = nixl.nixlAgentConfig()
        config.useProgThread, config.pthrDelay = True, _PROGRESS_US
        config.useListenThread, config.captureTelemetry = False, False
        config.syncMode = nixl.NIXL_THREAD_SYNC_NONE
        devices = {} if everywhere else {"UCX_NET_DEVICES": "lo"}
        with self._explained("cannot start its backend UCX"), _defaults(devices):
            self._agent = nixl.nixlAgent(name, config)
            self._backends = [self._agent.createBackend("UCX", {})]

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            raise PeerUnreachable(f"nixl {what}: {error}") from None

    def allocate(self, size: int) -> Region:
        """Allocate and register `size` bytes, with all pages populated."""
        return self.register(populated(size))

    def register(self, view: memoryview) -> Region:
        """Register memory. `view` must stay valid until `unregister` or `close`. Raises PeerUnreachable."""
        at = address(view)
        wanted = self._nixl.nixlRegDList(self._nixl.DRAM_SEG, [(at, len(view), 0, "")])
        with self._explained(f"cannot register {len(view)} bytes"):
            self._agent.registerMem(wanted, self._backends)
        return Region(view, at, wanted)

    def unregister(self, region: Region) -> None:
        """Undo `register`."""
        with self._explained("cannot let go of memory"):
            self._agent.deregisterMem(region.registration, self._backends)

    def metadata(self) -> bytes:
        """What a peer's agent needs to read all memory registered so far. Not a pickle."""
        with self._explained("has no metadata"):
            data: bytes = self._agent.getLocalMD()
        return data

    def meet(self, name: str, metadata: bytes) -> None:
        """Add a peer's agent. Raises PeerUnreachable, also when `metadata` belongs to an agent of another name."""
        with self._explained(f"cannot reach {name}"):
            found = self._agent.loadRemoteMD(metadata).decode(errors="replace")
            if found != name:
                self._agent.invalidateRemoteMD(found)
                raise PeerUnreachable(f"nixl cannot reach {name}: its metadata is of the agent {found[:80]!r}")

    def part(self, name: str) -> None:
        """Remove a peer's agent. Call it only when no read from it is in flight: such a read continues to write."""
        with suppress(*self._errors):  # never added, or removed by nixl
            self._agent.invalidateRemoteMD(name)

    def read(self, name: str, into: Sequence[Span], what: Sequence[Span]) -> int:
        """Start a read; returns its handle for `ended` and `release`. Raises PeerUnreachable."""
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
        """Whether the read has ended. Raises PeerUnreachable when it has failed."""
        with self._explained("lost its peer"):
            return bool(self._agent.getXferStatus(read) == self._nixl.NIXL_SUCCESS)

    def release(self, read: int) -> None:
        """Free the handle of a read that has ended."""
        with self._explained("cannot release a read"):
            self._agent.releaseXferReq(read)

    def close(self) -> None:
        """End the agent's threads. Free registered memory only afterwards: the backend may be reading it for a peer."""
        self._agent = None
