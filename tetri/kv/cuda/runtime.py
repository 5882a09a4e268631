"""Wraps CuPy: the CUDA runtime calls of the path `cuda_ipc`, on one GPU. All other modules see device memory as
pointers (int) and as arrays of uint8.

All copies of a worker go to one stream, so they run in order. An engine with a stream of its own sets `stream`; copies
then run in order with its kernels as well.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from tetri.kv.base import KVError

HANDLE_BYTES = 64  # of an IPC handle of memory or of an event
_NOT_READY = 600  # cudaErrorNotReady
_MOST_GPUS = 64
_GRANULE = 2 << 20  # bytes: smallest allocation that the driver does not share


class Device:
    """GPU `index` of those visible to this process. `cupy` is the module or a test double. Use it only from the thread
    that created it. `stream` is a cudaStream_t; `near` are the UUIDs of GPUs with mutual peer access."""

    def __init__(self, cupy: Any, index: int = 0) -> None:
        self.cupy, self.runtime, self.index = cupy, cupy.cuda.runtime, index
        with self.explained(f"GPU {index} cannot be used"):
            self.runtime.setDevice(index)
            self.runtime.free(0)  # creates the CUDA context, unless there is one
            self.stream: int = self.runtime.streamCreateWithFlags(self.runtime.streamNonBlocking)
            self.uuid = self._uuid(index)
            self.near = [self._uuid(other) for other in range(self.runtime.getDeviceCount()) if self._reaches(other)]

    def _uuid(self, index: int) -> str:
        """UUID and bus number, because CuPy cuts the UUID at its first zero byte."""
        uuid: bytes = self.runtime.getDeviceProperties(index)["uuid"]
        return f"GPU-{uuid.hex()}-{self.runtime.deviceGetPCIBusId(index)}"

    def _reaches(self, other: int) -> bool:
        """Whether this GPU and `other` can read each other's memory."""
        can = self.runtime.deviceCanAccessPeer
        return other != self.index and bool(can(self.index, other) and can(other, self.index))

    @contextmanager
    def explained(self, what: str, kind: type[KVError] = KVError) -> Iterator[None]:
        """Raise a CUDA runtime error as a KVError of one line."""
        try:
            yield
        except self.runtime.CUDARuntimeError as error:
            raise kind(f"{what}: {error}") from None

    # ------------------------------------------------------------ memory

    def allocate(self, size: int, what: str) -> int:
        """Device memory in an allocation of its own; returns its pointer. An IPC handle exports a whole allocation: it
        would also expose neighbours in CuPy's pool, or small allocations that the driver puts together. Raises
        KVError."""
        size = -(-size // _GRANULE) * _GRANULE
        free, total = (amount / 2**20 for amount in self.runtime.memGetInfo())
        wanted = f"{size / 2**20:,.0f} MB of the GPU's memory for {what} ({free:,.0f} of {total:,.0f} MB are free)"
        with self.explained(f"cannot have {wanted}: use fewer slots, or less for the engine"):
            pointer: int = self.runtime.malloc(size)
            return pointer

    def release(self, pointer: int) -> None:
        """Free memory of `allocate`."""
        self.runtime.free(pointer)

    def array(self, pointer: int, size: int) -> Any:
        """A uint8 array over `size` bytes of device memory, which it does not own."""
        cuda = self.cupy.cuda
        memory = cuda.UnownedMemory(pointer, size, None, self.index)
        return self.cupy.ndarray((size,), dtype="uint8", memptr=cuda.MemoryPointer(memory, 0))

    def copy(self, into: int, source: int, size: int) -> None:
        """Queue a copy on the stream, between any two of device, peer and pinned host memory."""
        self.runtime.memcpyAsync(into, source, size, self.runtime.memcpyDefault, self.stream)

    def wait(self) -> None:
        """Block until the stream has done all queued work."""
        self.runtime.streamSynchronize(self.stream)

    @contextmanager
    def computing(self) -> Iterator[Any]:
        """CuPy, with `stream` as its current stream."""
        with self.cupy.cuda.Stream.from_external(_Stream(self.stream)):
            yield self.cupy

    # ------------------------------------------------------------ events

    def new_event(self) -> int:
        """An event that other processes can wait for. Such events have no timing."""
        flags = self.runtime.eventInterprocess | self.runtime.eventDisableTiming
        event: int = self.runtime.eventCreateWithFlags(flags)
        return event

    def record(self, event: int) -> None:
        """Record the event on the stream."""
        self.runtime.eventRecord(event, self.stream)

    def done(self, event: int) -> bool:
        """Whether the last record of this event has completed. Raises CUDARuntimeError."""
        status: int = self.runtime.eventQuery(event)
        if status not in (0, _NOT_READY):
            raise self.runtime.CUDARuntimeError(status)
        return status == 0

    def follow(self, event: int) -> None:
        """Make later work of the stream wait for the event."""
        self.runtime.streamWaitEvent(self.stream, event)

    def drop_event(self, event: int) -> None:
        """Destroy the event."""
        self.runtime.eventDestroy(event)


class _Stream:
    """A foreign stream for CuPy, by the CUDA stream protocol."""

    def __init__(self, pointer: int) -> None:
        self.pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


class Buffer:
    """Memory reused by every fetch, or every put; it grows for a larger chunk. Host memory is pinned, so that the GPU
    copies directly and at full speed."""

    def __init__(self, device: Device, size: int, what: str, *, pinned: bool) -> None:
        self.device, self.what, self.pinned = device, what, pinned
        self.pointer = self.size = 0
        self.fit(size)

    def fit(self, size: int) -> None:
        """Grow to at least `size` bytes; growing discards the content. Raises KVError."""
        if size <= self.size:
            return
        self.close()
        if self.pinned:
            with self.device.explained(f"cannot have {size / 2**20:,.0f} MB of pinned memory for {self.what}"):
                self.pointer = self.device.runtime.hostAlloc(size, 0)
        else:
            self.pointer = self.device.allocate(size, self.what)
        self.size = size

    def view(self, start: int, size: int) -> Any:
        """A memoryview (pinned memory) or a uint8 array (device memory); valid until the buffer grows."""
        if not self.pinned:
            return self.device.array(self.pointer + start, size)
        return memoryview((ctypes.c_ubyte * size).from_address(self.pointer + start)).cast("B")

    def close(self) -> None:
        """Free the memory after the stream is done. A second call does nothing."""
        pointer, self.pointer, self.size = self.pointer, 0, 0
        if pointer:
            self.device.wait()
            (self.device.runtime.freeHost if self.pinned else self.device.release)(pointer)


def load() -> ModuleType:
    """Import CuPy and check that it finds a GPU. Raises KVError that says what is missing and what to do."""
    try:
        import cupy
    except ImportError as error:
        raise KVError(f"the KV path cuda_ipc needs CuPy ({error}): pip install 'tetri[cuda]'") from None
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise KVError(f"CuPy finds no GPU that it can use ({error}): see nvidia-smi") from None
    if not count:
        raise KVError("CuPy finds no GPU: see nvidia-smi, and CUDA_VISIBLE_DEVICES")
    module: ModuleType = cupy
    return module


def put_first(gpu: int) -> None:
    """Make `gpu` number 0 of this process. Call it before CUDA starts. The other GPUs stay visible, because CUDA can
    only report peer access between visible GPUs. Raises KVError."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    # CUDA ignores everything from the first invalid number on, so a list that is too long is safe.
    known = [str(number) for number in range(_MOST_GPUS)] if visible is None else visible.split(",")
    if gpu >= len(known):
        raise KVError(f"there is no GPU {gpu}: CUDA_VISIBLE_DEVICES={visible}")
    first = known.pop(gpu)
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join([first, *known])
