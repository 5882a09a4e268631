"""Readers that copy while the caller waits: one slab opened for each peer, and closed when the peer goes."""

from tetri.instance import Reach
from tetri.kv.base import KVCorrupt, KVLost, Wanted
from tetri.kv.mapped import CopyingReader, MappingReader
from tetri.wire.handover import Handle


def wanted(peer):
    return Wanted((peer, 0), peer, "shm", Handle(segment="s", slots=[0], generations=[1], block_bytes=1), None)


def reach(segment):
    return Reach(paths=["shm"], host="here", process=1, segment=segment)


class Shelf(MappingReader[str]):
    """Copies the name of the slab; `seen` has what is opened and closed."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def map(self, reach):
        self.seen.append(f"+{reach.segment}")
        return reach.segment

    def unmap(self, opened):
        self.seen.append(f"-{opened}")

    def copy(self, wanted):
        return [self.opened(wanted.peer).encode()]


def test_a_slab_is_opened_once_and_closed_with_its_peer_or_its_successor():
    shelf = Shelf()
    shelf.meet("p0", reach("a"))
    assert shelf.seen == []
    for _ in range(2):
        assert shelf.fetch(wanted("p0")).blocks == [b"a"]
    shelf.meet("p0", reach("a"))
    assert shelf.seen == ["+a"]
    shelf.meet("p0", reach("b"))
    assert shelf.fetch(wanted("p0")).blocks == [b"b"] and shelf.seen == ["+a", "-a", "+b"]
    shelf.part("p0")
    shelf.part("p0")
    assert shelf.seen[3:] == ["-b"] and isinstance(shelf.fetch(wanted("p0")).problem, KVLost)
    shelf.meet("p1", reach("c"))
    shelf.fetch(wanted("p1"))
    shelf.close()
    shelf.close()
    assert shelf.seen[4:] == ["+c", "-c"]


def test_a_problem_is_the_answer_to_its_fetch():
    class Broken(CopyingReader):
        def copy(self, wanted):
            raise KVCorrupt("other bytes")

    found = Broken().fetch(wanted("p0"))
    assert found.ticket == ("p0", 0) and not found.blocks and str(found.problem) == "other bytes"
    assert list(Broken().fetched()) == []
