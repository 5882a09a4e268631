"""The contract of the KV paths, over nixl. All stores are in one process; test_mover.py has several."""

import os

import pytest

from tests.kv.contract import StoreContract
from tests.kv.parties import World
from tetri.kv.local import LocalReader
from tetri.kv.nixl.reader import open_nixl
from tetri.kv.shm import ShmSlab
from tetri.kv.store import Store
from tetri.request import Reach


class NixlWorld(World):
    path = "nixl"

    def store(self, iid, wake, slots, block_bytes, digest):
        slab = ShmSlab("test", iid, slots, block_bytes, self.folder, digest)
        reader, ticket = open_nixl(slab, 4 * block_bytes, wake, everywhere=False)
        reach = Reach(paths=["nixl"], host="here", process=1, segment=slab.segment.name, tickets={"nixl": ticket})
        return Store(slab, {"nixl": reader}, reach, LocalReader({slab.segment.name: slab.segment}))


class TestNixl(StoreContract):
    @pytest.fixture
    def world(self, tmp_path):
        """In a folder of its own; a real file system does for shared memory."""
        threads = len(os.listdir("/proc/self/task"))
        world = NixlWorld(tmp_path)
        yield world
        world.close()
        assert list(tmp_path.iterdir()) == []
        assert len(os.listdir("/proc/self/task")) <= threads + 1, "threads left"  # UCX keeps one for the process
