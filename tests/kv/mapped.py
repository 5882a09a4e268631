"""Shared memory in a folder of a test's own: a real file system does for it."""

from tests.kv.parties import World
from tetri.kv.base import Wanted
from tetri.kv.local import LocalReader
from tetri.kv.shm import ShmReader, ShmSlab
from tetri.kv.store import Store
from tetri.request import Reach

SLOTS, BLOCK = 4, 100


def put(slab, *blocks):
    def write(views):
        for view, data in zip(views, blocks, strict=True):
            view[:] = data

    return slab.put(len(blocks), write)


class Peer:
    """A reader as a worker has it: `fetch` gives the blocks' bytes, or raises the problem."""

    def __init__(self, folder):
        self.reader = ShmReader("test", 0, str(folder))

    def meet(self, segment, peer="p0"):
        self.reader.meet(peer, Reach(paths=["shm"], host="here", process=1, segment=segment))

    def fetch(self, handle, digest, peer="p0"):
        fetched = self.reader.fetch(Wanted(("d", 0), peer, "shm", handle, digest))
        if fetched.problem is not None:
            raise fetched.problem
        return [bytes(view) for view in fetched.blocks]


class ShmWorld(World):
    path = "shm"

    def store(self, iid, wake, slots, block_bytes, digest):
        slab = ShmSlab("test", iid, slots, block_bytes, self.folder, digest)
        reach = Reach(paths=["shm"], host="here", process=1, segment=slab.segment.name)
        reader = ShmReader("test", 0, self.folder)
        return Store(slab, {"shm": reader}, reach, LocalReader({slab.segment.name: slab.segment}))
