"""A slab in GPU memory, and the receiver's copy out of such a slab.

A slab is one raw allocation, exported once. Its metadata segment lies in shared host memory (segment.py) and has the
slab's name and generations, used as with `shm`. In place of each block it has the IPC handle of the event that the
owner's stream recorded after it wrote the slot's KV chunk.

An engine on the GPU writes and reads device arrays. An engine on the host (`on_host`) uses pinned memory, which is
copied.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tetri.kv.base import Block, KVError, Wanted, Write
from tetri.kv.cuda.runtime import HANDLE_BYTES, Buffer, Device
from tetri.kv.lease import all_fallen
from tetri.kv.mapped import CopyingReader
from tetri.kv.segment import create
from tetri.kv.slab import HostSlab, Segment, digest_of
from tetri.kv.staging import check_digest, check_generations, check_handle
from tetri.wire.handover import Handle

TICKET = struct.Struct(f"=QQ{HANDLE_BYTES}s")  # slots, bytes of a block, the memory's IPC handle
MOST_EVENTS = 1000  # drivers fail somewhere above 20,000; PyTorch stops at 1,000 as well
DIRECTORY = "/dev/shm"


@dataclass(frozen=True, slots=True)
class DeviceSegment:
    """A slab in GPU memory. `metadata`: its metadata segment, with the slab's block size; `base`: device pointer of
    slot 0 in this process."""

    metadata: Segment
    base: int

    def at(self, slot: int) -> int:
        """Device pointer of a slot."""
        return self.base + slot * self.metadata.block_bytes


class DeviceSlab(HostSlab):
    """`slots` blocks of `block_bytes` each in the memory of `device`. `patience_s`: seconds that `close` waits for
    readers to end their leases. Raises KVError when memory is too small."""

    def __init__(
        self,
        device: Device,
        deployment: str,
        iid: str,
        slots: int,
        block_bytes: int,
        *,
        digest: bool = True,
        on_host: bool = False,
        expected_blocks: int = 0,
        directory: str = DIRECTORY,
        patience_s: float = 2.0,
    ) -> None:
        self.device, self.on_host, self.deployment, self.directory = device, on_host, deployment, directory
        self.expected_bytes, self._patience_s = expected_blocks * block_bytes, patience_s
        self._events: list[int] = []
        self._metadata = create(directory, deployment, iid, slots, HANDLE_BYTES)
        self._path = os.path.join(directory, self._metadata.segment.name)
        try:
            base = device.allocate(slots * block_bytes, f"{slots} slots of {block_bytes} bytes")
        except KVError:
            self._metadata.unlink(self._path)
            self._metadata.close()
            raise
        # More slots than events: slots share them. A later record is still correct, as all are on one stream.
        self._events = [device.new_event() for _ in range(min(slots, MOST_EVENTS))]
        self._records = [device.runtime.ipcGetEventHandle(event) for event in self._events]
        own = replace(self._metadata.segment, block_bytes=block_bytes, blocks=memoryview(b""))
        self.memory = DeviceSegment(own, base)
        self._pinned = Buffer(device, self.expected_bytes, "a chunk that leaves", pinned=True)
        self.ticket = TICKET.pack(slots, block_bytes, device.runtime.ipcGetMemHandle(base))
        super().__init__(own, digest)

    def _fill(self, slots: Sequence[int], write: Write) -> int | None:
        """Gather the blocks and record the event. A digest needs a synchronous copy to the host."""
        device, size = self.device, self.segment.block_bytes
        hosted = self.on_host or self._digest
        if hosted:
            self._pinned.fit(len(slots) * size)
        views = [self._pinned.view(place * size, size) for place in range(len(slots))] if hosted else []
        if self.on_host:
            write(views)
            for place, slot in enumerate(slots):
                device.copy(self.memory.at(slot), self._pinned.pointer + place * size, size)
        else:
            write([device.array(self.memory.at(slot), size) for slot in slots])
        self._written(slots)
        if self._digest and not self.on_host:
            for place, slot in enumerate(slots):
                device.copy(self._pinned.pointer + place * size, self.memory.at(slot), size)
        if hosted:
            device.wait()  # for the digest; and the next chunk uses the same pinned memory
        return digest_of(views) if self._digest else None

    def _written(self, slots: Sequence[int]) -> None:
        """Record one event for the KV chunk and publish its handle for each of the chunk's slots."""
        if slots:
            chosen = slots[0] % len(self._events)
            self.device.record(self._events[chosen])
            for slot in slots:
                self._metadata.segment.block(slot)[:] = self._records[chosen]

    def counters(self) -> dict[str, int]:
        """As in `Slab`."""
        return self._metadata.counters()

    def close(self) -> None:
        """Make later opens and fetches fail with KVLost. Free the memory once no reader holds a lease, or, after
        `patience_s`, leave it until this process ends. A second call does nothing."""
        if self._metadata.descriptor < 0:
            return
        super().close()
        for slot in range(self.slots):
            self.segment.generations[slot] += 1
        self._metadata.unlink(self._path)
        self.device.wait()
        self._pinned.close()
        if all_fallen(self._metadata.descriptor, self._patience_s):
            for event in self._events:
                self.device.drop_event(event)
            self.device.release(self.memory.base)
        else:
            message = "%s is still open in another process after %.1f s: the GPU's memory comes back when this one ends"
            logging.getLogger("tetri").warning(message, self.segment.name, self._patience_s)
        self.segment.release()
        self._metadata.close()


class DeviceStaging:
    """The receiver's memory: a buffer on its GPU and a pinned one for the digest, reused by every fetch. `size`:
    expected bytes of a KV chunk; the first fetch of a larger one is slower."""

    def __init__(self, device: Device, size: int, on_host: bool) -> None:
        self._device, self._on_host = device, on_host
        self._copies = Buffer(device, size, "a chunk that arrives", pinned=False)
        self._pinned = Buffer(device, size, "a chunk that arrives", pinned=True)

    def fetch(
        self, source: DeviceSegment, handle: Handle, digest: int | None, follow: Callable[[int], None] | None = None
    ) -> list[Block]:
        """Copy the blocks of `handle` out of `source`. `follow(slot)` makes the stream wait until the owner has written
        the chunk with that slot. Raises KVForeign, KVLost or KVCorrupt."""
        metadata, count = source.metadata, len(handle.slots)
        check_handle(metadata, handle)
        size, device, hosted = metadata.block_bytes, self._device, self._on_host or digest is not None
        self._copies.fit(count * size)
        if hosted:
            self._pinned.fit(count * size)
        if follow is not None and count:
            follow(handle.slots[0])
        for place, slot in enumerate(handle.slots):
            device.copy(self._copies.pointer + place * size, source.at(slot), size)
        if hosted and count:
            device.copy(self._pinned.pointer, self._copies.pointer, count * size)
        device.wait()
        check_generations(metadata, handle)
        if digest is not None:
            check_digest(metadata.name, digest_of([self._pinned.view(0, count * size)]), digest)
        views = self._pinned if self._on_host else self._copies
        return [views.view(place * size, size) for place in range(count)]

    def close(self) -> None:
        """Free both buffers."""
        self._copies.close()
        self._pinned.close()


class HomeReader(CopyingReader):
    """Reads the worker's own slab, for a worker that decodes what it prefilled. It needs no event, because all work is
    on one stream; and CUDA cannot open an IPC handle in the process that made it. CudaReader owns and closes the
    staging memory."""

    def __init__(self, slab: DeviceSlab, staging: DeviceStaging) -> None:
        self._slab, self._staging = slab, staging

    def copy(self, wanted: Wanted) -> list[Block]:
        return self._staging.fetch(self._slab.memory, wanted.handle, wanted.digest)
