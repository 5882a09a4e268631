"""The narrow seam to CuPy: the calls of the CUDA runtime that the path `cuda_ipc` makes, on one GPU. Everything else
knows device memory as pointers (int) and as arrays of uint8.

One stream carries all of a worker's copies, so they are in order with one another; an engine that computes on a stream
of its own gives that one (`stream`), and they are in order with its kernels too.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from tetri.kv.base import KVError

HANDLE_BYTES = 64  # of a memory's or an event's IPC handle
_NOT_READY = 600  # cudaErrorNotReady
_MOST_GPUS = 64
_GRANULE = 2 << 20  # bytes that the driver gives at least


class Device:
    """The GPU number `index` of those that this process sees, by `cupy` (the module, or what stands in for it). Belongs
    to the thread that makes it. `stream` is a cudaStream_t."""

    def __init__(self, cupy: Any, index: int = 0) -> None:
        self.cupy, self.runtime, self.index = cupy, cupy.cuda.runtime, index
        with self.explained(f"GPU {index} cannot be used"):
            self.runtime.setDevice(index)
            self.runtime.free(0)  # makes the context, if nobody has
            self.stream: int = self.runtime.streamCreateWithFlags(self.runtime.streamNonBlocking)
            self.uuid = self._uuid(index)
            self.near = [self._uuid(other) for other in range(self.runtime.getDeviceCount()) if self._reaches(other)]

    def _uuid(self, index: int) -> str:
        """With the bus number, because CuPy cuts the UUID at its first zero byte."""
        uuid: bytes = self.runtime.getDeviceProperties(index)["uuid"]
        return f"GPU-{uuid.hex()}-{self.runtime.deviceGetPCIBusId(index)}"

    def _reaches(self, other: int) -> bool:
        """Whether each of two GPUs can read the other's memory."""
        can = self.runtime.deviceCanAccessPeer
        return other != self.index and bool(can(self.index, other) and can(other, self.index))

    @contextmanager
    def explained(self, what: str, kind: type[KVError] = KVError) -> Iterator[None]:
        """An error of the runtime as one line of ours."""
        try:
            yield
        except self.runtime.CUDARuntimeError as error:
            raise kind(f"{what}: {error}") from None

    # ------------------------------------------------------------ memory

    def allocate(self, size: int, what: str) -> int:
        """Device memory that is an allocation of its own, as an IPC handle needs it: a piece of CuPy's pool would bring
        its neighbours along, and so would a small one, of which the driver keeps several together. Raises KVError."""
        size = -(-size // _GRANULE) * _GRANULE
        free, total = (amount / 2**20 for amount in self.runtime.memGetInfo())
        wanted = f"{size / 2**20:,.0f} MB of the GPU's memory for {what} ({free:,.0f} of {total:,.0f} MB are free)"
        with self.explained(f"cannot have {wanted}: use fewer slots, or less for the engine"):
            pointer: int = self.runtime.malloc(size)
            return pointer

    def release(self, pointer: int) -> None:
        self.runtime.free(pointer)

    def array(self, pointer: int, size: int) -> Any:
        """Device memory as an array of uint8, which does not own it."""
        cuda = self.cupy.cuda
        memory = cuda.UnownedMemory(pointer, size, None, self.index)
        return self.cupy.ndarray((size,), dtype="uint8", memptr=cuda.MemoryPointer(memory, 0))

    def copy(self, into: int, source: int, size: int) -> None:
        """In the stream's order, between any two of device, peer and pinned host memory."""
        self.runtime.memcpyAsync(into, source, size, self.runtime.memcpyDefault, self.stream)

    def wait(self) -> None:
        """Until all that was given to the stream is done."""
        self.runtime.streamSynchronize(self.stream)

    @contextmanager
    def computing(self) -> Iterator[Any]:
        """CuPy, whose kernels go to the stream meanwhile."""
        with self.cupy.cuda.Stream.from_external(_Stream(self.stream)):
            yield self.cupy

    # ------------------------------------------------------------ events

    def new_event(self) -> int:
        """One that another process may wait for: such events cannot be timed."""
        flags = self.runtime.eventInterprocess | self.runtime.eventDisableTiming
        event: int = self.runtime.eventCreateWithFlags(flags)
        return event

    def record(self, event: int) -> None:
        self.runtime.eventRecord(event, self.stream)

    def done(self, event: int) -> bool:
        """Whether what was recorded last has come to pass."""
        status: int = self.runtime.eventQuery(event)
        if status not in (0, _NOT_READY):
            raise self.runtime.CUDARuntimeError(status)
        return status == 0

    def follow(self, event: int) -> None:
        """What the stream is given from now on comes after the event."""
        self.runtime.streamWaitEvent(self.stream, event)

    def drop_event(self, event: int) -> None:
        self.runtime.eventDestroy(event)


class _Stream:
    """A stream that CuPy did not make, by CUDA's protocol for that."""

    def __init__(self, pointer: int) -> None:
        self.pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


class Buffer:
    """Memory that every take, or every put, uses again, and that grows when a chunk is larger than any before. On the
    host it is pinned: the GPU copies from and to such memory without a detour, and at full speed."""

    def __init__(self, device: Device, size: int, what: str, *, pinned: bool) -> None:
        self.device, self.what, self.pinned = device, what, pinned
        self.pointer = self.size = 0
        self.fit(size)

    def fit(self, size: int) -> None:
        """At least `size` bytes from now on; what was in it is gone when it grows. Raises KVError."""
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
        """A memoryview of pinned memory, an array of device memory; valid until it grows."""
        if not self.pinned:
            return self.device.array(self.pointer + start, size)
        return memoryview((ctypes.c_ubyte * size).from_address(self.pointer + start)).cast("B")

    def close(self) -> None:
        """A second call does nothing."""
        pointer, self.pointer, self.size = self.pointer, 0, 0
        if pointer:
            self.device.wait()
            (self.device.runtime.freeHost if self.pinned else self.device.release)(pointer)


def load() -> ModuleType:
    """CuPy, on a machine that has a GPU for it. Raises KVError: what is missing, and what to do."""
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
    """Make this GPU number 0 of this process, before anything looks for GPUs. The others stay visible: whether two GPUs
    reach each other can only be asked where both are seen. Raises KVError."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    # CUDA stops at the first number that is no GPU's, so naming too many does no harm.
    known = [str(number) for number in range(_MOST_GPUS)] if visible is None else visible.split(",")
    if gpu >= len(known):
        raise KVError(f"there is no GPU {gpu}: CUDA_VISIBLE_DEVICES={visible}")
    first = known.pop(gpu)
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join([first, *known])
