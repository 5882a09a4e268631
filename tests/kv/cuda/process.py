"""Stores in the memory of GPUs, each in a process of its own, as CUDA wants it: on the GPUs that are there, or on the
stand-in."""

import multiprocessing
import os
import signal
import timeit
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tests.kv.cuda.stand_in import install
from tests.kv.parties import World
from tetri.kv.base import Fetched, Wanted
from tetri.kv.cuda.ipc import open_device_store
from tetri.kv.cuda.runtime import Device, load
from tetri.kv.cuda.slab import DeviceSlab

START_S = 60.0  # a CUDA context takes seconds


@dataclass(frozen=True)
class Cuda:
    """Which CUDA a process gets: the machine's own, or a stand-in."""

    stand_in: str = ""  # its folder; empty: none
    options: dict[str, Any] = field(default_factory=dict)

    def device(self, gpu: int) -> Device:
        if self.stand_in:
            install(self.stand_in, **self.options)
        return Device(load(), gpu)


class StoreProcess:
    """One process, which has at most one store at a time. Any method of `_Served` can be called on it."""

    def __init__(self, cuda: Cuda, gpu: int = 0) -> None:
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _serve, (cuda, gpu))
        self._pid = self._pool.submit(os.getpid)

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self._pool.submit(_call, name, *arguments).result(START_S)

    def kill(self) -> None:
        os.kill(self._pid.result(START_S), signal.SIGKILL)
        self.stop()

    def stop(self) -> None:
        """Returns when the process has ended."""
        self._pool.shutdown()


class RemoteStore:
    """A KVStore whose bytes go through a pipe: what is written into its blocks here is written there."""

    def __init__(self, process: StoreProcess, slots: int, block_bytes: int, *settings: Any) -> None:
        self.process, self.slots, self._size = process, slots, block_bytes
        self.reach = process.open(slots, block_bytes, *settings)
        for name in ("free", "freed", "counters", "meet", "part", "close"):
            setattr(self, name, getattr(process, name))

    @property
    def free_slots(self) -> int:
        return self.process.free_slots()

    def put(self, count, write, owner=""):
        views = [memoryview(bytearray(self._size)) for _ in range(count)]
        write(views)
        return self.process.put([bytes(view) for view in views], owner)

    def fetch(self, wanted: Wanted) -> Fetched:
        return Fetched(wanted.ticket, *self.process.fetch(wanted))

    def fetched(self):
        return ()


class ProcessWorld(World):
    """`idle` are processes, on the GPUs in turn."""

    path = "cuda_ipc"

    def __init__(self, folder: Path, idle: list[StoreProcess]) -> None:
        super().__init__()
        self.folder, self.idle = str(folder), list(idle)

    def store(self, iid, wake, slots, block_bytes, digest):
        return RemoteStore(self.idle.pop(0), slots, block_bytes, iid, digest, self.folder)

    def close(self) -> None:
        super().close()
        assert os.listdir(self.folder) == []


def _serve(cuda: Cuda, gpu: int) -> None:
    global _served
    _served = _Served(cuda, gpu)


def _call(name: str, *arguments: Any) -> Any:
    return getattr(_served, name)(*arguments)


class _Served:
    """What a StoreProcess can be asked."""

    def __init__(self, cuda: Cuda, gpu: int) -> None:
        self.cuda, self.gpu, self.store = cuda, gpu, None

    @cached_property
    def device(self):
        return self.cuda.device(self.gpu)

    def near(self):
        return self.device.near

    def open(self, slots, block_bytes, iid, digest, folder):
        settings = {"digest": digest, "directory": folder, "patience_s": 0.05}
        slab = DeviceSlab(self.device, "test", iid, slots, block_bytes, **settings)
        self.store = open_device_store(slab, "here")
        return self.store.reach

    def put(self, blocks, owner):
        def write(views):
            with self.device.computing() as xp:
                for view, data in zip(views, blocks, strict=True):
                    view[:] = xp.asarray(np.frombuffer(data, np.uint8))

        return self.store.put(len(blocks), write, owner)

    def fetch(self, wanted):
        fetched = self.store.fetch(wanted)
        while fetched is None:
            fetched = next(iter(self.store.fetched()), None)
        with self.device.computing() as xp:
            return [xp.asnumpy(block).tobytes() for block in fetched.blocks], fetched.problem

    def time_takes(self, wanted, times):
        """Seconds of each take."""

        def take():
            problem = self.store.fetch(wanted).problem
            assert problem is None, problem

        return timeit.repeat(take, number=1, repeat=times)

    def time_copies(self, size, times):
        """Seconds of each plain copy inside the GPU's memory."""
        pointers = [self.device.allocate(size, "a copy") for _ in range(2)]
        seconds = timeit.repeat(lambda: (self.device.copy(*pointers, size), self.device.wait()), number=1, repeat=times)
        for pointer in pointers:
            self.device.release(pointer)
        return seconds

    def name(self):
        return self.device.runtime.getDeviceProperties(self.device.index).get("name", b"stand-in").decode()

    def free_slots(self):
        return self.store.free_slots

    def close(self):
        if self.store is not None:
            self.store.close()

    def __getattr__(self, name):
        return getattr(self.store, name)
