"""A store whose paths are bad: every fault changes the bytes or the time, and the digest's check is the store's own."""

import pytest

from tetri.faults import Chance, Faults
from tetri.instance import Reach
from tetri.kv.base import Fetched, KVCorrupt, KVLost, Wanted
from tetri.kv.faulty_store import FaultyStore
from tetri.kv.local import LocalReader, LocalSlab
from tetri.kv.store import Store

BLOCK = 100  # bytes
BLOCKS = [bytes([number]) * BLOCK for number in range(4)]


def write(into) -> None:
    for view, content in zip(into, BLOCKS, strict=True):
        view[:] = content


def die(moment: str) -> None:
    raise InterruptedError(moment)


class Bench:
    """A sender and a receiver in one process, both behind the same dice."""

    def __init__(self, digest: bool = True, **faults: float) -> None:
        segments = {}
        self.now, self.digest = 100.0, digest
        self.chance = Chance(Faults(**faults), "x")
        self.slab = LocalSlab("p0", 8, BLOCK, segments, digest=digest)
        reach = Reach(paths=["local"], host="h", process=1, segment=self.slab.segment.name)
        inner = Store(self.slab, {}, reach, LocalReader(segments))
        self.store = FaultyStore(inner, self.chance, die, lambda: self.now)

    def put(self) -> Wanted:
        handle, digest = self.store.put(4, write)
        assert (digest is None) != self.digest
        return Wanted(("d:r1", 0), "p0", "local", handle, digest)

    def count(self, kind: str) -> int:
        return self.chance.counts[kind]


def content(fetched: Fetched) -> list[bytes]:
    assert fetched.problem is None
    return [bytes(each) for each in fetched.blocks]


def test_without_faults_a_store_does_what_it_does() -> None:
    bench = Bench()
    wanted = bench.put()
    assert content(bench.store.fetch(wanted)) == BLOCKS
    assert list(bench.store.fetched()) == [] and bench.store.due() is None
    bench.store.free(wanted.handle)
    assert bench.store.freed() == 4 and bench.store.free_slots == bench.store.slots == 8
    assert bench.chance.counters() == {}


def test_a_flipped_byte_the_digest_finds_and_the_next_copy_is_right() -> None:
    bench = Bench(flip=0.5)
    wanted, wrong = bench.put(), 0
    for _ in range(60):
        fetched = bench.store.fetch(wanted)
        if fetched.problem is None:
            assert content(fetched) == BLOCKS
        else:
            assert isinstance(fetched.problem, KVCorrupt) and not fetched.blocks
            wrong += 1
    assert 0 < wrong == bench.count("flip") < 60


@pytest.mark.parametrize("in_parts", [False, True])
def test_without_a_digest_it_gets_through(in_parts: bool) -> None:
    """Which proves that the bytes really are damaged."""
    bench = Bench(digest=False, flip=1.0)
    wanted = bench.put()
    if in_parts:
        parts = tuple((memoryview(block)[:7], memoryview(block)[7:]) for block in BLOCKS)
        bench.store.store.fetch = lambda wanted: Fetched(wanted.ticket, parts)
    found = content(bench.store.fetch(wanted))
    differ = [a ^ b for a, b in zip(b"".join(found), b"".join(BLOCKS), strict=True) if a != b]
    assert len(differ) == 1 and differ[0].bit_count() == 1


def test_what_was_cut_short_is_the_beginning_and_the_next_copy_is_whole() -> None:
    bench = Bench(truncate=0.5)
    wanted, short = bench.put(), 0
    for _ in range(60):
        found = content(bench.store.fetch(wanted))
        assert found == BLOCKS[: len(found)]
        short += len(found) < len(BLOCKS)
    assert 0 < short == bench.count("truncate") < 60


def test_a_corrupt_slab_is_found_however_often_it_is_read_and_a_lost_chunk_is_lost_at_once() -> None:
    spoil, lose = Bench(spoil=1.0), Bench(lose=1.0)
    wanted = spoil.put()
    assert all(isinstance(spoil.store.fetch(wanted).problem, KVCorrupt) for _ in range(3))
    assert isinstance(lose.store.fetch(lose.put()).problem, KVLost)
    assert spoil.count("spoil") == lose.count("lose") == 1 and lose.store.due() is None


def test_a_late_chunk_is_taken_later_and_only_then() -> None:
    bench = Bench(late=1.0, longest=0.5)
    kept, freed = bench.put(), bench.put()
    assert bench.store.fetch(kept) is None and bench.store.fetch(freed) is None
    assert 100.0 <= bench.store.due() <= 100.5 and list(bench.store.fetched()) == []
    bench.store.free(freed.handle)
    bench.put()  # by then the slots may be another's
    bench.now = 100.5
    found, lost = [(fetched.problem, [bytes(each) for each in fetched.blocks]) for fetched in bench.store.fetched()]
    assert found == (None, BLOCKS) and isinstance(lost[0], KVLost)


def test_a_path_that_takes_time_is_as_bad() -> None:
    """What comes by `fetched` of a store passes the same hop."""
    bench = Bench(flip=1.0)

    class Slow(Store):
        def fetch(self, wanted: Wanted) -> None:
            self.waiting = wanted

        def fetched(self):
            yield super().fetch(self.waiting)

        def due(self) -> float:
            return 3.0

    inner = bench.store.store
    slow = Slow(inner.slab, {}, inner.reach, inner.readers["local"])
    bench.store = FaultyStore(slow, bench.chance, die, lambda: bench.now)
    assert bench.store.fetch(bench.put()) is None
    (fetched,) = bench.store.fetched()
    assert isinstance(fetched.problem, KVCorrupt) and bench.store.due() == 3.0


def test_a_process_dies_in_the_middle() -> None:
    moments = {}
    for seed in range(40):
        bench = Bench(die=0.4, seed=seed)
        try:
            bench.store.fetch(bench.put())
        except InterruptedError as death:
            moments[str(death)] = None
            assert bench.count("die") == 1
    assert len(moments) == 3


def test_what_a_write_raises_goes_on_and_leaves_nothing() -> None:
    bench = Bench(spoil=1.0)

    def fail(into: object) -> None:
        raise ValueError("the engine")

    with pytest.raises(ValueError, match="the engine"):
        bench.store.put(4, fail)
    assert bench.store.free_slots == 8 and bench.count("spoil") == 0
