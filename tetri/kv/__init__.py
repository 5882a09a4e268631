"""KV stores: where a chunk's blocks lie between the sender's engine and the receiver's, and how they are read there."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tetri.kv.base import KVError, KVStore, Reader
from tetri.kv.cuda.runtime import Device
from tetri.kv.slab import HostSlab
from tetri.request import Reach

PATHS = ("shm", "stream", "nixl", "cuda_ipc")

EXPECTED_BLOCKS = 4  # of a chunk from a peer


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """A store of `slots` blocks of `block_bytes`. `transport` is auto or one path's name; `address` where to serve the
    path `stream`, empty: not at all, or on this host alone when `stream` is asked for by name; `announce` what others
    connect to, where that is another address; `key` the file of the deployment's key; `buffer` the bytes of memory for
    what comes over `stream`; `device` the worker's GPU, None: it has none; `on_host` where its engine's blocks are."""

    deployment: str
    iid: str
    slots: int
    block_bytes: int
    transport: str = "auto"
    address: str = ""
    digest: bool = True
    announce: str = ""
    key: str = ""
    buffer: int = 64 << 20
    device: Device | None = None
    on_host: bool = True


def open_store(settings: StoreSettings, wake: Callable[[], None] = lambda: None) -> KVStore:
    """The slab and the readers that `settings` ask for. `wake` is called, from any thread, when something has come.
    Raises KVError: no room, or what a path needs is not there."""
    from tetri.kv.local import LocalReader
    from tetri.kv.shm import ShmSlab, sweep
    from tetri.kv.store import Store

    made = settings
    paths = enabled(made)
    sweep(made.deployment, made.iid)  # what a killed predecessor left may be the memory that is needed now
    if "cuda_ipc" in paths:
        return _device_store(made)
    slab = ShmSlab(made.deployment, made.iid, made.slots, made.block_bytes, digest=made.digest)
    opened: dict[str, Opened] = {}
    try:
        for path in paths:
            opened[path] = _open(path, made, slab, wake)
    except BaseException:
        for each in opened.values():
            each.reader.close()
        slab.close()
        raise
    name = slab.segment.name
    reach = Reach(
        paths=paths,
        host=host(made.deployment),
        process=os.getpid(),
        segment=name,
        address="".join(each.address for each in opened.values()),
        tickets={path: each.ticket for path, each in opened.items() if each.ticket},
    )
    readers = {path: each.reader for path, each in opened.items()}
    return Store(slab, readers, reach, LocalReader({name: slab.segment}))


def enabled(made: StoreSettings) -> list[str]:
    """The paths that a worker has, the best first."""
    from tetri.kv.nixl import agent as nixl_agent

    if made.transport != "auto":
        return [made.transport]
    if made.device is not None:
        return ["cuda_ipc"]
    paths = ["shm"]
    if made.address and nixl_agent.installed() and nixl_agent.has_rdma():
        paths.append("nixl")
    return [*paths, "stream"] if made.address else paths


def _device_store(made: StoreSettings) -> KVStore:
    """A slab in a GPU's memory, which no other path reads."""
    from tetri.kv.cuda.ipc import open_device_store

    if made.device is None:
        raise KVError("transfer.transport = cuda_ipc: each [[worker]] needs a GPU, such as gpu = 0")
    return open_device_store(
        made.device,
        made.deployment,
        made.iid,
        made.slots,
        made.block_bytes,
        lambda: host(made.deployment),
        digest=made.digest,
        on_host=made.on_host,
        expected_blocks=EXPECTED_BLOCKS,
    )


@dataclass(frozen=True, slots=True)
class Opened:
    """One path, and what others must know to use it (`Reach`)."""

    reader: Reader
    address: str = ""
    ticket: bytes = b""


def _open(path: str, made: StoreSettings, slab: HostSlab, wake: Callable[[], None]) -> Opened:
    """Each path may need what the others do not (a GPU's library), so it is imported on use."""
    match path:
        case "shm":
            from tetri.kv.shm import ShmReader

            return Opened(ShmReader(made.deployment, EXPECTED_BLOCKS * made.block_bytes))
        case "nixl":
            from tetri.kv.nixl.reader import open_nixl

            reader, ticket = open_nixl(slab, EXPECTED_BLOCKS * made.block_bytes, wake, everywhere=bool(made.address))
            return Opened(reader, ticket=ticket)
        case "stream":
            from tetri.kv.stream.stream import open_stream

            stream = open_stream(made, slab, EXPECTED_BLOCKS * made.block_bytes, wake)
            return Opened(stream, stream.address)
    raise KVError(f"unknown KV transport {path[:80]!r}: use auto or {', '.join(PATHS)}")


def host(deployment: str) -> str:
    """The same for all processes of a deployment that share this machine, its /dev/shm and their user: a reader takes
    no segment of another deployment's."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}-{os.stat('/dev/shm').st_dev}-{os.geteuid()}-{deployment}"
