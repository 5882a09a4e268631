"""Stores that reach each other over ZeroMQ and TCP."""

import random

from tests.kv.parties import World
from tetri.instance import Reach
from tetri.kv.local import LocalReader, LocalSlab
from tetri.kv.store import Store
from tetri.kv.stream.fetch import StreamPatience
from tetri.kv.stream.stream import StreamReader, StreamSettings


def big(number, size=1 << 20):
    """As `block`, for many megabytes."""
    return random.Random(number).randbytes(size)


class StreamWorld(World):
    path = "stream"
    settings = StreamSettings(patience=StreamPatience(stall_s=1.0, lost_s=3.0))

    def expect_the_worst(self):
        self.settings = StreamSettings(patience=StreamPatience(stall_s=0.1, lost_s=0.3))

    def store(self, iid, wake, slots, block_bytes, digest):
        slab = LocalSlab(iid, slots, block_bytes, {}, digest)
        stream = StreamReader(slab, self.settings, wake)
        name = slab.segment.name
        reach = Reach(paths=["stream"], host=iid, process=1, segment=name, address=stream.address)
        counted = {"stream": lambda: stream.counters}
        return Store(slab, {"stream": stream}, reach, LocalReader({name: slab.segment}), counted=counted)
