"""KV stores: they hold KV chunks between the engines of the prefill and the decode instance, and move them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tetri.instance import Reach
from tetri.kv.base import KVError, KVStore, Reader
from tetri.kv.cuda.runtime import Device
from tetri.kv.slab import HostSlab
from tetri.policy.pairing import TRANSPORTS

EXPECTED_BLOCKS = 4  # in a KV chunk from a peer; sizes the receive buffers


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """Settings of one worker's KV store, which has `slots` blocks of `block_bytes`.

    `transport`: "auto" or the name of one path.
    `address`: where the path `stream` listens. Empty: no `stream`, or loopback only if `transport` is "stream".
    `announce`: the address that peers connect to, if it differs from `address`.
    `key`: file of the deployment's key, which `stream` needs.
    `buffer`: bytes of memory for chunks that arrive over `stream`.
    `device`: the worker's GPU, or None.
    `on_host`: whether the engine keeps its KV blocks in host memory.
    """

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
    """Create the slab and one reader for each enabled path. `wake` is called, from any thread, when a fetch completes.
    Raises KVError when memory is too small or a path lacks a library, device or address."""
    from tetri.kv.local import LocalReader
    from tetri.kv.shm import ShmSlab, sweep
    from tetri.kv.store import Store

    paths = enabled(settings)
    sweep(settings.deployment, settings.iid)  # a killed predecessor may have left a segment; its memory is needed now
    if "cuda_ipc" in paths:
        return _device_store(settings)
    slab = ShmSlab(settings.deployment, settings.iid, settings.slots, settings.block_bytes, digest=settings.digest)
    opened: dict[str, Opened] = {}
    with ExitStack() as undo:
        undo.callback(slab.close)
        for path in paths:
            opened[path] = _open(path, settings, slab, wake)
            undo.callback(opened[path].reader.close)
        undo.pop_all()
    name = slab.segment.name
    reach = Reach(
        paths=paths,
        host=host(settings.deployment),
        process=os.getpid(),
        segment=name,
        address="".join(each.address for each in opened.values()),
        tickets={path: each.ticket for path, each in opened.items() if each.ticket},
    )
    readers = {path: each.reader for path, each in opened.items()}
    counted = {path: each.counters for path, each in opened.items() if each.counters is not None}
    return Store(slab, readers, reach, LocalReader({name: slab.segment}), counted=counted)


def enabled(settings: StoreSettings) -> list[str]:
    """The KV paths that these settings enable, best first."""
    from tetri.kv.nixl import agent as nixl_agent

    if settings.transport != "auto":
        return [settings.transport]
    if settings.device is not None:
        return ["cuda_ipc"]
    paths = ["shm"]
    if settings.address and nixl_agent.installed() and nixl_agent.has_rdma():
        paths.append("nixl")
    return [*paths, "stream"] if settings.address else paths


def _device_store(settings: StoreSettings) -> KVStore:
    """A store in GPU memory; only the path `cuda_ipc` can read it."""
    from tetri.kv.cuda.ipc import open_device_store
    from tetri.kv.cuda.slab import DeviceSlab

    if settings.device is None:
        raise KVError("transfer.transport = cuda_ipc: each [[worker]] needs a GPU, such as gpu = 0")
    slab = DeviceSlab(
        settings.device,
        settings.deployment,
        settings.iid,
        settings.slots,
        settings.block_bytes,
        digest=settings.digest,
        on_host=settings.on_host,
        expected_blocks=EXPECTED_BLOCKS,
    )
    return open_device_store(slab, host(settings.deployment))


@dataclass(frozen=True, slots=True)
class Opened:
    """The reader of one path, what peers need to use that path (goes into `Reach`), and what returns its counters."""

    reader: Reader
    address: str = ""
    ticket: bytes = b""
    counters: Callable[[], Mapping[str, int]] | None = None


def _open(path: str, settings: StoreSettings, slab: HostSlab, wake: Callable[[], None]) -> Opened:
    """Open one path. Imports are local because a path may need a library that the others do not."""
    expected = EXPECTED_BLOCKS * settings.block_bytes
    match path:
        case "shm":
            from tetri.kv.shm import ShmReader

            return Opened(ShmReader(settings.deployment, expected))
        case "nixl":
            from tetri.kv.nixl.reader import open_nixl

            reader, ticket = open_nixl(slab, expected, wake, everywhere=bool(settings.address))
            return Opened(reader, ticket=ticket)
        case "stream":
            from tetri.kv.stream.stream import ANYWHERE_HERE, StreamReader, StreamSettings

            at = settings.address or ANYWHERE_HERE
            served = StreamSettings(at, settings.announce, settings.key, settings.buffer, expected)
            stream = StreamReader(slab, served, wake)
            return Opened(stream, stream.address, counters=lambda: stream.counters)
    raise KVError(f"unknown KV transport {path[:80]!r}: use auto or {', '.join(TRANSPORTS)}")


def host(deployment: str) -> str:
    """A name that is equal for all processes with the same deployment, machine, /dev/shm and user: exactly these can
    map each other's segments."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}-{os.stat('/dev/shm').st_dev}-{os.geteuid()}-{deployment}"
