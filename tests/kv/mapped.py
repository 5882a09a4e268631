"""Shared memory in a folder of a test's own: a real file system does for it."""

from tests.kv.parties import World
from tetri.instance import Reach
from tetri.kv.local import LocalReader
from tetri.kv.shm import ShmReader, ShmSlab
from tetri.kv.store import Store


def put(slab, *blocks):
    def write(views):
        for view, data in zip(views, blocks, strict=True):
            view[:] = data

    return slab.put(len(blocks), write)


class ShmWorld(World):
    path = "shm"

    def store(self, iid, wake, slots, block_bytes, digest):
        slab = ShmSlab("test", iid, slots, block_bytes, self.folder, digest)
        reach = Reach(paths=["shm"], host="here", process=1, segment=slab.segment.name)
        reader = ShmReader("test", 0, self.folder)
        return Store(slab, {"shm": reader}, reach, LocalReader({slab.segment.name: slab.segment}))
