"""A store whose reads fail for a while, and only those that are cut."""

import pytest

from tetri.faults import parse_cuts
from tetri.instance import Reach
from tetri.kv.base import KVCorrupt, KVLost, Wanted
from tetri.kv.cut_store import CutStore
from tetri.kv.local import LocalReader, LocalSlab
from tetri.kv.store import Store

BLOCK = b"k" * 100


def write(into):
    into[0][:] = BLOCK


class Bench:
    """What d0 reads of p0 and p1."""

    def __init__(self, cuts, file=""):
        segments = {}
        self.now, self.slab = 50.0, LocalSlab("p0", 4, len(BLOCK), segments)
        reach = Reach(paths=["local"], host="h", process=1, segment=self.slab.segment.name)
        inner = Store(self.slab, {}, reach, LocalReader(segments))
        self.store = CutStore(inner, parse_cuts(cuts), "d0", str(file), lambda: self.now)
        self.handle, self.digest = self.store.put(1, write)

    def problem(self, peer="p0"):
        fetched = self.store.fetch(Wanted(("d:r", 0), peer, "local", self.handle, self.digest))
        assert fetched.problem is not None or [bytes(each) for each in fetched.blocks] == [BLOCK]
        return type(fetched.problem)


NONE = type(None)


@pytest.mark.parametrize(
    ("cuts", "from_p0", "from_p1"),
    [
        ("d0", KVLost, KVLost),
        ("flip:d0", KVCorrupt, KVCorrupt),
        ("p0>d0", KVLost, NONE),
        ("d1, p1>d0", NONE, KVLost),
        ("d1,d0>p0", NONE, NONE),
    ],
)
def test_who_cannot_read_whom(cuts, from_p0, from_p1):
    bench = Bench(cuts)
    assert (bench.problem(), bench.problem("p1")) == (from_p0, from_p1)
    assert bench.store.counters() == {"injected_cut": 2 - [from_p0, from_p1].count(NONE)}


def test_a_cut_lasts_for_its_seconds_since_the_start():
    bench, found = Bench("d0@2-3"), []
    for bench.now in (51.9, 52.0, 52.9, 53.0):
        found.append(bench.problem())
    assert found == [NONE, KVLost, KVLost, NONE]


def test_a_cut_lasts_while_its_file_exists(tmp_path):
    bench = Bench("d0@file", tmp_path / "cut")
    assert bench.problem() is NONE
    (tmp_path / "cut").touch()
    assert bench.problem() is KVLost
    (tmp_path / "cut").unlink()
    assert bench.problem() is NONE
