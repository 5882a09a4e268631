"""Stores in the memory of GPUs, each in a process of its own, as CUDA wants it: on the GPUs that are there, or on the
stand-in."""

import multiprocessing
import os
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.kv.cuda.stand_in import install
from tests.kv.parties import PATIENCE_S, World, block
from tetri.kv.base import Fetched, KVError, KVLost, Wanted
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
    """One process, which has at most one store at a time."""

    def __init__(self, cuda: Cuda, gpu: int = 0) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, cuda, gpu), daemon=True)
        self._process.start()
        there.close()
        self._started = False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)

        def call(*arguments: Any) -> Any:
            self._pipe.send((name, arguments))
            assert self._pipe.poll(PATIENCE_S if self._started else START_S), f"no answer to {name}"
            self._started = True
            result = self._pipe.recv()
            if isinstance(result, BaseException):
                raise result
            return result

        return call

    def kill(self) -> None:
        self._process.kill()
        self._process.join(PATIENCE_S)

    def stop(self) -> None:
        self._pipe.close()
        self._process.join(PATIENCE_S)
        ended = self._process.exitcode
        self.kill()
        assert ended is not None, "a store's process did not end"


class RemoteStore:
    """A KVStore whose bytes go through a pipe: what is written into its blocks here is written there."""

    def __init__(self, process: StoreProcess, slots: int, block_bytes: int, *settings: Any) -> None:
        self.process, self.slots, self._size = process, slots, block_bytes
        self.reach = process.open(slots, block_bytes, *settings)
        for name in ("free", "freed", "meet", "part", "keep", "let_go"):
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

    def due(self):
        return None

    def close(self) -> None:
        self.process.close()


class ProcessWorld(World):
    """`idle` are processes, on the GPUs in turn; a closed store's process goes back to them."""

    path = "cuda_ipc"

    def __init__(self, folder: Path, idle: list[StoreProcess]) -> None:
        super().__init__()
        self.folder, self.idle, self.used = str(folder), list(idle), []

    def store(self, iid, wake, slots, block_bytes, digest):
        process = self.idle.pop(0)
        self.used.append(process)
        return RemoteStore(process, slots, block_bytes, iid, digest, self.folder)

    def close(self) -> None:
        super().close()
        assert os.listdir(self.folder) == []


def killed_sender_is_lost_and_its_successor_is_read(folder: Path, cuda: Cuda) -> None:
    """A test's body, for the stand-in and for a GPU."""
    first, receiver, second = processes = [StoreProcess(cuda, 0) for _ in range(3)]
    world = ProcessWorld(folder, processes)
    try:
        sender, reader = world.pair()
        chunk = sender.put(block(1), block(2))
        assert reader.fetch(chunk) == [block(1), block(2)]
        first.kill()
        sender.closed = True
        with pytest.raises(KVLost, match="or has ended"):
            reader.fetch(chunk)
        again = world.open("p0")
        reader.meet(again)
        assert reader.fetch(again.put(block(3))) == [block(3)]
    finally:
        for process in (receiver, second):
            process.close(), process.stop()


def _serve(pipe: Connection, cuda: Cuda, gpu: int) -> None:
    served = _Served(cuda, gpu)
    while True:
        try:
            name, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(getattr(served, name)(*arguments))
        except (KVError, ValueError, OSError, RuntimeError, AssertionError) as error:
            pipe.send(error if isinstance(error, KVError) else RuntimeError(f"{type(error).__name__}: {error}"))


class _Served:
    """What a StoreProcess can be asked."""

    def __init__(self, cuda: Cuda, gpu: int) -> None:
        self.cuda, self.gpu, self.device, self.store = cuda, gpu, None, None

    def open(self, slots, block_bytes, iid, digest, folder):
        self.device = self.device or self.cuda.device(self.gpu)
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
        with self.device.computing() as xp:
            return [xp.asnumpy(block).tobytes() for block in fetched.blocks], fetched.problem

    def time_takes(self, wanted, times):
        """Seconds of each take."""
        return [self._seconds(lambda: self._good(self.store.fetch(wanted))) for _ in range(times)]

    @staticmethod
    def _good(fetched):
        if fetched.problem is not None:
            raise fetched.problem

    def time_copies(self, size, times):
        """Seconds of each plain copy inside the GPU's memory."""
        pointers = [self.device.allocate(size, "a copy") for _ in range(2)]
        try:
            return [self._seconds(lambda: self._copy(*pointers, size)) for _ in range(times)]
        finally:
            for pointer in pointers:
                self.device.release(pointer)

    def _copy(self, into, source, size):
        self.device.copy(into, source, size)
        self.device.wait()

    @staticmethod
    def _seconds(do):
        start = time.perf_counter()
        do()
        return time.perf_counter() - start

    def name(self):
        name = self.device.runtime.getDeviceProperties(self.device.index).get("name", b"stand-in")
        return name.decode()

    def free_slots(self):
        return self.store.free_slots

    def close(self):
        if self.store is not None:
            self.store.close()

    def __getattr__(self, name):
        return getattr(self.store, name)
