"""The contract of the KV paths, over the memory of one process."""

from tests.kv.contract import StoreContract
from tests.kv.parties import World, block
from tetri.instance import Reach
from tetri.kv.local import LocalReader, LocalSlab
from tetri.kv.store import Store


class LocalWorld(World):
    path = "local"

    def __init__(self, folder):
        super().__init__(folder)
        self.peers = {}

    def store(self, iid, wake, slots, block_bytes, digest):
        slab = LocalSlab(iid, slots, block_bytes, self.peers, digest)
        reach = Reach(paths=["local"], host="here", process=1, segment=slab.segment.name)
        return Store(slab, {}, reach, LocalReader(self.peers))


class TestLocal(StoreContract):
    """Whoever shares the process's memory needs no introduction, and stays when parted from."""

    World = LocalWorld

    def test_nothing_comes_from_who_was_never_met(self, world):
        sender, receiver = world.open("p0"), world.open("d0")
        assert receiver.fetch(sender.put(block(1))) == [block(1)]

    def test_parted_from_each_take_is_answered_once_and_later_ones_are_lost(self, pair):
        sender, receiver = pair
        receiver.store.part("p0")
        assert receiver.fetch(sender.put(block(1))) == [block(1)]

    def test_another_peers_chunk_is_foreign_or_lost(self, pair):
        sender, receiver = pair
        assert receiver.fetch(sender.put(block(1)), peer="p1") == [block(1)], "the segment alone says whose it is"
