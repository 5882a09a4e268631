"""Stores that reach each other over ZeroMQ and TCP."""

import os
import random

from tests.kv.parties import World
from tetri.instance import Reach
from tetri.kv.local import LocalReader, LocalSlab
from tetri.kv.store import Store
from tetri.kv.stream.fetch import StreamPatience
from tetri.kv.stream.stream import StreamReader, StreamSettings
from tetri.net import keys


def big(number, size=1 << 20):
    """As `block`, for many megabytes."""
    return random.Random(number).randbytes(size)


class StreamWorld(World):
    path = "stream"

    def __init__(self, folder):
        super().__init__(folder)
        self.key = os.path.join(self.folder, "key")
        keys.generate(self.key)
        self.set(patience=StreamPatience(stall_s=1.0, lost_s=3.0))

    def set(self, **settings):
        """Of the stores that are opened from now on."""
        self.settings = StreamSettings(**{"key": self.key, **settings})

    def expect_the_worst(self):
        self.set(patience=StreamPatience(stall_s=0.1, lost_s=0.3))

    def close(self):
        super().close()
        os.unlink(self.key)

    def store(self, iid, wake, slots, block_bytes, digest):
        slab = LocalSlab(iid, slots, block_bytes, {}, digest)
        stream = StreamReader(slab, self.settings, wake)
        name = slab.segment.name
        reach = Reach(paths=["stream"], host=iid, process=1, segment=name, address=stream.address)
        counted = {"stream": lambda: stream.counters}
        return Store(slab, {"stream": stream}, reach, LocalReader({name: slab.segment}), counted=counted)
