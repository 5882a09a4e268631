"""A stand-in for CuPy that needs no GPU: device memory is files that processes map, and what CUDA leaves undefined
raises `Misuse`.

It is strict where a GPU may be lenient. A copy is done when the stream is waited for, not before. Memory of a peer may
be copied only behind an event of that peer. What is freed, closed, or not recorded cannot be used, and nothing
can be freed that another process has open.

One StandIn is one process's CUDA. Those with the same `folder` see each other's handles, in one process or in many.
"""

import ctypes
import fcntl
import importlib.machinery
import itertools
import mmap
import os
import struct
import sys
import time
import types
from contextlib import suppress
from pathlib import Path

import numpy as np

MEMORY, EVENT, HANDLE = b"memory", b"event", 64
PAGE = 4096
INVALID_VALUE, OUT_OF_MEMORY, INVALID_DEVICE, PEER_UNSUPPORTED, NOT_READY = 1, 2, 101, 217, 600
#: What stands at the beginning of each file: device, freed or destroyed, bytes; of an event: recordings, done, when.
STATE = struct.Struct("=QQQQQd")
PATIENCE_S = 5.0  # then a stream that waits counts as hung
_numbers = itertools.count()


class Misuse(AssertionError):
    """What CUDA leaves undefined, or what would hang. No code under test catches it."""


class CUDARuntimeError(RuntimeError):
    def __init__(self, status):
        self.status = status
        super().__init__(f"cudaError{status}: stand-in")


class Shared:
    """A file with a STATE, and perhaps memory behind it, mapped."""

    def __init__(self, path, size=0, **state):
        self.path, fresh = path, bool(state)
        descriptor = os.open(path, os.O_RDWR | (os.O_CREAT | os.O_EXCL if fresh else 0), 0o600)
        try:
            if fresh:
                os.ftruncate(descriptor, PAGE + size)
            self.mapped = mmap.mmap(descriptor, 0)
        finally:
            os.close(descriptor)
        self.size = len(self.mapped) - PAGE
        self.bytes = np.frombuffer(self.mapped, np.uint8)[PAGE:]
        if fresh:
            self.set(**state)

    FIELDS = ("device", "gone", "bytes_", "recorded", "done", "done_at")

    def get(self):
        return types.SimpleNamespace(**dict(zip(self.FIELDS, STATE.unpack_from(self.mapped), strict=True)))

    def set(self, **changed):
        values = {**vars(self.get()), **changed}
        STATE.pack_into(self.mapped, 0, *(values[field] for field in self.FIELDS))

    @property
    def address(self):
        return self.bytes.ctypes.data


class Array(np.ndarray):
    """An array of device memory that cannot be touched once the memory is gone, and takes no host memory."""

    alive = staticmethod(lambda: None)

    def __array_finalize__(self, of):
        self.alive = getattr(of, "alive", self.alive)

    def __getitem__(self, at):
        self.alive()
        return super().__getitem__(at)

    def __setitem__(self, at, value):
        self.alive()
        if isinstance(value, memoryview | bytes | bytearray):
            raise TypeError("a device array takes no host memory")
        super().__setitem__(at, value)

    def get(self):
        self.alive()
        return np.array(self, subok=False)


class Runtime:
    """In place of cupy.cuda.runtime."""

    CUDARuntimeError = CUDARuntimeError
    eventDisableTiming, eventInterprocess, streamNonBlocking, memcpyDefault = 2, 4, 1, 4

    def __init__(self, folder, devices=1, peers=(), total=1 << 30, lag_s=0.0):
        self.folder, self.peers, self.total, self.lag_s = Path(folder), set(peers), total, lag_s
        self.visible = _visible(devices)
        self.process = f"{os.getpid()}.{next(_numbers)}"
        self.device = self.visible[0] if self.visible else -1
        self.memory = {}  # address -> (Shared, "own" | "peer")
        self.pinned = {}  # address -> array
        self.events = {}  # number -> (Shared, flags, "own" | "peer")
        self.streams = {0: []}  # number -> what is to be done, in order
        self.behind = {}  # stream -> processes whose events it has waited for since it was waited for itself
        self.locks = {}  # path -> descriptor, of the peers' memory that is open here
        self.calls = []

    def getDeviceCount(self):
        return len(self.visible)

    def setDevice(self, index):
        if not 0 <= index < len(self.visible):
            raise CUDARuntimeError(INVALID_DEVICE)
        self.device = self.visible[index]

    def getDeviceProperties(self, index):
        return {"uuid": bytes([self.visible[index] + 1]) * 4}  # cut at a zero byte, as CuPy does

    def deviceGetPCIBusId(self, index):
        return f"0000:{self.visible[index]:02x}:00.0"

    def deviceCanAccessPeer(self, one, other):
        return int(self._reach(self.visible[one], self.visible[other]))

    def _reach(self, one, other):
        return (one, other) in self.peers or (other, one) in self.peers

    def memGetInfo(self):
        used = sum(each.size for each, kind in self.memory.values() if kind == "own" and not each.get().gone)
        return self.total - used, self.total

    def _made(self, kind, size):
        state = {"device": self.device, "gone": 0, "bytes_": size, "recorded": 0, "done": 0, "done_at": 0.0}
        return Shared(self.folder / f"{kind}-{self.process}-{next(_numbers)}", size, **state)

    def malloc(self, size):
        if size > self.memGetInfo()[0]:
            raise CUDARuntimeError(OUT_OF_MEMORY)
        made = self._made("memory", size)
        self.memory[made.address] = made, "own"
        return made.address

    def free(self, pointer):
        if pointer == 0:
            return
        made, kind = self.memory.get(pointer, (None, None))
        if kind != "own" or made.get().gone:
            raise Misuse(f"free of {pointer:#x}, which is not an allocation of this process, or was freed before")
        for lock in self.folder.glob(f"{made.path.name}.open-*"):
            if _locked(lock):
                raise Misuse(f"free of memory that {lock.name} still has open")
        self.flush()
        made.set(gone=1)
        made.bytes[:] = 0xDD

    def hostAlloc(self, size, flags):
        array = np.full(size, 0xCC, np.uint8)
        self.pinned[array.ctypes.data] = array
        return array.ctypes.data

    def freeHost(self, pointer):
        if self.pinned.pop(pointer, None) is None:
            raise Misuse("freeHost of what hostAlloc did not give")

    def ipcGetMemHandle(self, pointer):
        made, kind = self.memory.get(pointer, (None, None))
        if kind != "own":
            raise Misuse("a memory handle is of an own allocation's beginning only")
        return made.path.name.encode().ljust(HANDLE, b"\0")

    def ipcOpenMemHandle(self, handle, flags=1):
        path = self.folder / _name(handle, MEMORY)
        if path.name.split("-")[1] == self.process:
            raise Misuse("a process opens the handle of its own memory")
        if path in self.locks:
            raise Misuse(f"{path.name} is opened a second time")
        if not path.exists():
            raise CUDARuntimeError(INVALID_VALUE)
        shared = Shared(path)
        state = shared.get()
        if state.gone:
            raise Misuse(f"{path.name} is opened, but was freed")
        if state.device != self.device and not self._reach(self.device, state.device):
            raise CUDARuntimeError(PEER_UNSUPPORTED)
        lock = os.open(f"{path}.open-{self.process}", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        self.locks[path] = lock
        self.memory[shared.address] = shared, "peer"
        return shared.address

    def ipcCloseMemHandle(self, pointer):
        shared, kind = self.memory.get(pointer, (None, None))
        if kind != "peer":
            raise Misuse("ipcCloseMemHandle of what is not open")
        self.flush()
        self.memory[pointer] = shared, "closed"
        os.unlink(f"{shared.path}.open-{self.process}")
        os.close(self.locks.pop(shared.path))

    def check(self, pointer, size):
        """The Shared that the bytes at `pointer` lie in, and whose it is; None for pinned memory."""
        for base, array in self.pinned.items():
            if base <= pointer and pointer + size <= base + array.size:
                return None, "host"
        for base, (shared, kind) in self.memory.items():
            if base <= pointer and pointer + size <= base + shared.size:
                if kind == "closed":
                    raise Misuse(f"use of {shared.path.name} after its handle was closed")
                if shared.get().gone:
                    raise Misuse(f"use of {shared.path.name} after it was freed")
                return shared, kind
        raise Misuse(f"{size} bytes at {pointer:#x} are in no memory that this process knows")

    def memcpyAsync(self, into, source, size, kind, stream):
        for pointer in (into, source):
            shared, whose = self.check(pointer, size)
            if whose == "peer" and shared.path.name.split("-")[1] not in self.behind.get(stream, ()):
                raise Misuse(f"{shared.path.name} is copied without waiting for an event of its process")
        if self.check(into, size)[1] == "peer":
            raise Misuse("a peer's memory is only read")

        def run():
            self.check(into, size), self.check(source, size)
            ctypes.memmove(into, source, size)

        self._queue(stream).append(run)

    def streamCreateWithFlags(self, flags):
        number = next(_numbers) + 1
        self.streams[number] = []
        return number

    def _queue(self, stream):
        if stream not in self.streams:
            raise Misuse(f"there is no stream {stream}")
        return self.streams[stream]

    def streamSynchronize(self, stream):
        queue = self._queue(stream)
        while queue:
            queue.pop(0)()
        self.behind.pop(stream, None)

    def flush(self):
        for stream in self.streams:
            self.streamSynchronize(stream)

    def eventCreateWithFlags(self, flags):
        number = next(_numbers) + 1
        self.events[number] = self._made("event", 0), flags, "own"
        return number

    def _event(self, event):
        if event not in self.events:
            raise Misuse(f"there is no event {event}, or it was destroyed")
        shared, _, kind = self.events[event]
        if shared.get().gone:
            raise Misuse("an event whose process has destroyed it")
        return shared, kind

    def eventDestroy(self, event):
        shared, kind = self._event(event)
        if kind == "own":
            shared.set(gone=1)
        del self.events[event]

    def ipcGetEventHandle(self, event):
        shared, _ = self._event(event)
        wanted = self.eventInterprocess | self.eventDisableTiming
        if self.events[event][1] & wanted != wanted:
            raise Misuse("only an event with Interprocess and DisableTiming has a handle")
        return shared.path.name.encode().ljust(HANDLE, b"\0")

    def ipcOpenEventHandle(self, handle):
        path = self.folder / _name(handle, EVENT)
        if path.name.split("-")[1] == self.process:
            raise Misuse("a process opens the handle of its own event")
        if any(shared.path == path for shared, _, _ in self.events.values()):
            raise Misuse(f"{path.name} is opened a second time")
        number = next(_numbers) + 1
        self.events[number] = Shared(path), 0, "peer"
        self._event(number)
        return number

    def eventRecord(self, event, stream):
        shared, _ = self._event(event)
        count = shared.get().recorded + 1
        shared.set(recorded=count)
        work, queue = self._queue(stream), list(self._queue(stream))

        def run():
            shared.set(done=count, done_at=time.monotonic() + self.lag_s)

        # Kernels run at once here; an event behind nothing but them has come to pass at once too.
        (work.append if queue else lambda do: do())(run)

    def eventQuery(self, event):
        shared, _ = self._event(event)
        state = shared.get()
        if not state.recorded:
            raise Misuse("an event is asked or waited for before it was recorded")
        return 0 if state.done == state.recorded and time.monotonic() >= state.done_at else NOT_READY

    def streamWaitEvent(self, stream, event, flags=0):
        shared, _ = self._event(event)
        self._queue(stream)
        deadline = time.monotonic() + PATIENCE_S
        while self.eventQuery(event) == NOT_READY:
            if time.monotonic() > deadline:
                raise Misuse("a stream waits for an event that never comes: it hangs for ever")
            time.sleep(0.001)
        self.behind.setdefault(stream, set()).add(shared.path.name.split("-")[1])


class StandIn(types.ModuleType):
    """In place of the module cupy: `runtime`, arrays, and numpy for the rest."""

    def __init__(self, folder, **options):
        super().__init__("cupy")
        runtime = self.runtime = Runtime(folder, **options)

        class Stream:
            @classmethod
            def from_external(cls, stream):
                runtime._queue(stream.__cuda_stream__()[1])
                return cls()

            def __enter__(self):
                return self

            def __exit__(self, *error):
                pass

        self.cuda = types.SimpleNamespace(
            runtime=runtime,
            Stream=Stream,
            UnownedMemory=lambda pointer, size, owner, device: (pointer, size),
            MemoryPointer=lambda memory, offset: (memory[0] + offset, memory[1] - offset),
        )
        self.empty, self.asarray, self.uint8 = np.empty, np.asarray, np.uint8
        self.from_dlpack, self.asnumpy = lambda tensor: tensor.numpy(), np.asarray

    def ndarray(self, shape, dtype, memptr):
        (pointer, size), (count,) = memptr, shape
        assert np.dtype(dtype) == np.uint8 and count <= size
        self.runtime.check(pointer, size)
        array = np.frombuffer((ctypes.c_ubyte * count).from_address(pointer), np.uint8).view(Array)
        array.alive = lambda: self.runtime.check(pointer, size)
        return array


def _visible(devices):
    """The GPUs that $CUDA_VISIBLE_DEVICES lets through, up to the first that is none."""
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    numbers = range(devices) if wanted is None else map(int, filter(None, wanted.split(",")))
    return list(itertools.takewhile(lambda number: 0 <= number < devices, numbers))


def _name(handle, kind):
    name = handle.rstrip(b"\0")
    if len(handle) != HANDLE or not name.startswith(kind + b"-") or b"/" in name:
        raise CUDARuntimeError(INVALID_VALUE)
    return name.decode()


def _locked(path):
    with suppress(FileNotFoundError), open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def install(folder, **options):
    """`import cupy` gives a stand-in from now on, in this process. It is made as late as CuPy itself looks for GPUs."""

    class Finder:
        @classmethod
        def find_spec(cls, name, path=None, target=None):
            return importlib.machinery.ModuleSpec(name, cls) if name == "cupy" else None

        create_module = staticmethod(lambda spec: StandIn(folder, **options))
        exec_module = staticmethod(lambda module: None)

    sys.meta_path.insert(0, Finder)
