"""Reads peers' slabs over the path `cuda_ipc`: between GPUs of one host, or between processes on one GPU.

A copy is synchronous, as with `shm`: 12 MB on the device take 10 to 500 us, and a thread would give the CUDA stream a
second user. Only the sender's event could take long, if the sender dies before its gather is done. A stream that waits
for a dead process is unusable, and a thread that waits serves nothing else. So a fetch whose event is not done ends
here, and `fetched` tries again, up to a deadline.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial

from tetri.instance import Reach
from tetri.kv.base import Block, Fetched, KVError, KVForeign, KVLost, Wanted
from tetri.kv.cuda.runtime import Device
from tetri.kv.cuda.slab import TICKET, DeviceSegment, DeviceSlab, DeviceStaging, HomeReader
from tetri.kv.lease import lease, wanted_back
from tetri.kv.mapped import MappingReader
from tetri.kv.segment import Mapping, attach
from tetri.kv.store import Store

PATH = "cuda_ipc"
_LOOK_S = 1e-3  # interval between looks at events that are not done
_BACK_S = 0.5  # interval between checks for leases that owners want back


@dataclass(slots=True)
class OpenedSlab:
    """A peer's slab, opened in this process. `events`: IPC handle -> CUDA event."""

    memory: DeviceSegment
    metadata: Mapping
    descriptor: int  # the lease
    events: dict[bytes, int] = field(default_factory=dict)


class _Unwritten(KVLost):
    """The sender's gather is not done yet."""


@dataclass(slots=True)
class _Waiting:
    """A fetch whose sender's gather was not done at the last look. `until`: when it is given up."""

    wanted: Wanted
    until: float
    parted: bool = False


class CudaReader(MappingReader[OpenedSlab]):
    """Reader of the path `cuda_ipc`. `own`: name of this worker's slab, which CUDA cannot open in its own process.
    `event_s`: seconds that a sender's gather may take."""

    def __init__(
        self, device: Device, deployment: str, own: str, staging: DeviceStaging, directory: str, event_s: float
    ) -> None:
        super().__init__()
        self._device, self._deployment, self._own, self._staging = device, deployment, own, staging
        self._directory, self._event_s = directory, event_s
        self._look_at = 0.0
        self._waiting: deque[_Waiting] = deque()

    def unmap(self, opened: OpenedSlab) -> None:
        for event in opened.events.values():
            self._device.drop_event(event)
        self._device.runtime.ipcCloseMemHandle(opened.memory.base)
        opened.metadata.close()
        os.close(opened.descriptor)  # last: closing ends the lease, and the owner may then free the memory

    def part(self, peer: str) -> None:
        super().part(peer)
        for each in self._waiting:
            each.parted = each.parted or each.wanted.peer == peer

    def fetch(self, wanted: Wanted) -> Fetched | None:
        """None while the sender's gather is not done; blocks only while a copy runs."""
        return self._try(_Waiting(wanted, time.monotonic() + self._event_s))

    def _try(self, each: _Waiting) -> Fetched | None:
        """The result, or None: `fetched` tries again."""
        fetched = self.copied(each.wanted)
        if not isinstance(fetched.problem, _Unwritten):
            return fetched
        if time.monotonic() > each.until:
            return Fetched(fetched.ticket, problem=KVLost(f"{fetched.problem} within {self._event_s:g} s"))
        self._waiting.append(each)
        return None

    def due(self) -> float | None:
        """As of `KVStore`: when to look at the events that are not done."""
        return time.monotonic() + _LOOK_S if self._waiting else None

    def copy(self, wanted: Wanted) -> list[Block]:
        name, asked = self.reach(wanted.peer).segment, wanted.handle.segment
        if name != asked:
            raise KVForeign(f"the slab of {wanted.peer} is {name}, the handle is of {asked[:80]!r}")
        if name == self._own:
            raise KVForeign(f"{name} is this worker's own: it is read over the path local")
        opened = self.opened(wanted.peer)
        if wanted_back(opened.descriptor):
            self.shut(wanted.peer)
            raise KVLost(f"{name}: its owner has closed it, or has ended")
        return self._staging.fetch(opened.memory, wanted.handle, wanted.digest, partial(self._follow, opened))

    def map(self, reach: Reach) -> OpenedSlab:
        device, name, ticket = self._device, reach.segment, reach.tickets.get(PATH, b"")
        if reach.device not in (device.uuid, *device.near):
            raise KVLost(f"{name} is on {reach.device[:80]!r}, which {device.uuid} has no peer access to")
        if len(ticket) != TICKET.size:
            raise KVLost(f"{name}: a ticket of {len(ticket)} bytes, not {TICKET.size}")
        slots, block_bytes, handle = TICKET.unpack(ticket)
        metadata = attach(self._directory, self._deployment, name, reach.process)
        with ExitStack() as undo:
            undo.callback(metadata.close)
            if slots != metadata.segment.slots:
                raise KVLost(f"{name}: {metadata.segment.slots} slots, the ticket says {slots}")
            descriptor = lease(os.path.join(self._directory, name), reach.process)
            undo.callback(os.close, descriptor)
            with device.explained(f"{name}: cannot be opened", KVLost):
                base: int = device.runtime.ipcOpenMemHandle(handle)
            undo.pop_all()
        own_size = replace(metadata.segment, block_bytes=block_bytes, blocks=memoryview(b""))
        return OpenedSlab(DeviceSegment(own_size, base), metadata, descriptor)

    def _follow(self, opened: OpenedSlab, slot: int) -> None:
        """Order the stream after the sender's gather of the KV chunk that contains `slot`. Raises KVLost, _Unwritten
        while the gather is not done."""
        device, name, record = self._device, opened.memory.metadata.name, bytes(opened.metadata.segment.block(slot))
        if not any(record):
            raise KVLost(f"{name}: nothing was ever written to slot {slot}")
        event = opened.events.get(record)
        if event is None:
            with device.explained(f"{name}: its event cannot be opened", KVLost):
                event = opened.events[record] = device.runtime.ipcOpenEventHandle(record)
        if not device.done(event):
            raise _Unwritten(f"{name}: slot {slot} was not written")
        device.follow(event)

    def fetched(self) -> Iterator[Fetched]:
        """The fetches that waited for their sender's gather. Also closes slabs whose owners want them back, so that a
        restarted worker gets the GPU memory of its predecessor before membership reports the predecessor as gone."""
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + _BACK_S
            for peer in [peer for peer, opened in self._opened.items() if wanted_back(opened.descriptor)]:
                self.shut(peer)
        for _ in range(len(self._waiting)):
            each = self._waiting.popleft()
            gone = Fetched(each.wanted.ticket, problem=KVLost(f"{each.wanted.peer} is gone"))
            fetched = gone if each.parted else self._try(each)
            if fetched is not None:
                yield fetched

    def close(self) -> None:
        """Close all slabs and free the staging memory."""
        super().close()
        self._staging.close()


def open_device_store(slab: DeviceSlab, host: str, event_s: float = 1.0) -> Store:
    """A worker's store of `slab`, with `cuda_ipc` as its only path. `host` names the machine, for Reach. Raises
    KVError, and closes the slab, when memory is too small."""
    device = slab.device
    try:
        staging = DeviceStaging(device, slab.expected_bytes, slab.on_host)
    except KVError:
        slab.close()
        raise
    name = slab.segment.name
    reader = CudaReader(device, slab.deployment, name, staging, slab.directory, event_s)
    reach = Reach(
        paths=[PATH],
        host=host,
        process=os.getpid(),
        segment=name,
        device=device.uuid,
        near=device.near,
        tickets={PATH: slab.ticket},
    )
    return Store(slab, {PATH: reader}, reach, HomeReader(slab, staging), reader.due)
