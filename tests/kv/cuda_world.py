"""Stores in the memory of GPUs that are not there: each has a CUDA of its own, as each worker's process has."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np

from tests.kv.cuda_stand_in import StandIn
from tests.kv.parties import World
from tetri.kv.cuda.ipc import open_device_store
from tetri.kv.cuda.runtime import Device


class CudaWorld(World):
    """The stores take the `gpus` in turn, all of which reach each other."""

    path = "cuda_ipc"

    def __init__(self, folder: Path, on_host: bool = False, gpus: int = 1, **options: float) -> None:
        super().__init__()
        self.folder, self.on_host, self.gpus, self.options = folder, on_host, gpus, options
        self.turn = itertools.cycle(range(gpus))
        self.cards = folder / "cards"
        self.cards.mkdir()

    def device(self) -> Device:
        peers = itertools.combinations(range(self.gpus), 2)
        return Device(StandIn(self.folder, devices=self.gpus, peers=peers), next(self.turn))

    def store(self, iid, wake, slots, block_bytes, digest):
        return open_device_store(
            self.device(),
            "test",
            iid,
            slots,
            block_bytes,
            lambda: "here",
            digest=digest,
            on_host=self.on_host,
            directory=str(self.cards),
            **{"patience_s": 0.01, **self.options},
        )

    def fill(self, block, data):
        block[:] = data if self.on_host else np.frombuffer(data, np.uint8)

    def read(self, block):
        return bytes(block) if self.on_host else block.get().tobytes()
