"""Stores in the memory of GPUs that are not there: each has a CUDA of its own, as each worker's process has."""

import itertools
from pathlib import Path

import numpy as np

from tests.kv.cuda.stand_in import StandIn
from tests.kv.parties import World
from tetri.kv.cuda.ipc import open_device_store
from tetri.kv.cuda.runtime import Device
from tetri.kv.cuda.slab import DeviceSlab


class CudaWorld(World):
    """The stores take the `gpus` in turn, all of which reach each other."""

    path = "cuda_ipc"

    def __init__(self, folder: Path, on_host: bool = False, gpus: int = 1, **options: float) -> None:
        super().__init__()
        self.folder, self.on_host, self.gpus, self.options = folder, on_host, gpus, options
        self.turn, self.devices = itertools.cycle(range(gpus)), {}
        self.cards = folder / "cards"
        self.cards.mkdir()

    def device(self) -> Device:
        peers = itertools.combinations(range(self.gpus), 2)
        return Device(StandIn(self.folder, devices=self.gpus, peers=peers), next(self.turn))

    def store(self, iid, wake, slots, block_bytes, digest):
        options = {"patience_s": 0.01, "on_host": self.on_host, "directory": str(self.cards), **self.options}
        device = self.device()
        event_s = options.pop("event_s", 1.0)
        slab = DeviceSlab(device, "test", iid, slots, block_bytes, digest=digest, **options)
        made = open_device_store(slab, "here", event_s)
        self.devices[made] = device
        return made

    def fill(self, block, data):
        block[:] = data if self.on_host else np.frombuffer(data, np.uint8)

    def read(self, block):
        return bytes(block) if self.on_host else block.get().tobytes()


def device_of(party) -> Device:
    return party.world.devices[party.store]


def cuda(party):
    """The runtime that the party's process has."""
    return device_of(party).runtime


def calls(runtime, name):
    """The arguments of each call of the runtime from now on."""
    made, before = [], getattr(runtime, name)
    setattr(runtime, name, lambda *args: made.append(args) or before(*args))
    return made


def counted(party, name):
    return calls(cuda(party), name)
