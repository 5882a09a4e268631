"""A reader of shared memory as a worker has it, for the tests of slabs and segments."""

from tetri.kv.base import Wanted
from tetri.kv.shm import ShmReader
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
