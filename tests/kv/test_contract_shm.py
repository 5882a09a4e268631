"""The contract of the KV paths, over shared memory."""

import pytest

from tests.kv.contract import StoreContract
from tests.kv.parties import World
from tetri.kv.local import LocalReader
from tetri.kv.shm import ShmReader, ShmSlab
from tetri.kv.store import Store
from tetri.request import Reach


class ShmWorld(World):
    path = "shm"

    def __init__(self, folder):
        super().__init__()
        self.folder = str(folder)

    def store(self, iid, wake, slots, block_bytes, digest):
        slab = ShmSlab("test", iid, slots, block_bytes, self.folder, digest)
        reach = Reach(paths=["shm"], host="here", process=1, segment=slab.segment.name)
        reader = ShmReader("test", 0, self.folder)
        return Store(slab, {"shm": reader}, reach, LocalReader({slab.segment.name: slab.segment}))


class TestShm(StoreContract):
    @pytest.fixture
    def world(self, tmp_path):
        """In a folder of its own; a real file system does for shared memory."""
        world = ShmWorld(tmp_path)
        yield world
        world.close()
        assert list(tmp_path.iterdir()) == []
