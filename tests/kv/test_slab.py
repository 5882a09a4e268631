"""What both stores promise, held against both, and against random histories."""

from contextlib import suppress

import pytest
import xxhash
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.kv.slabs import BLOCK, block, replaced, writer
from tetri.kv import open_store
from tetri.kv.base import KVCorrupt, KVError, KVLost
from tetri.kv.local import LocalStore
from tetri.kv.shm import ShmStore

SLOTS = 6


@pytest.fixture(params=["local", "shm"])
def pair(request, tmp_path):
    """(sender, receiver), which can reach each other."""
    if request.param == "local":
        neighbours = {}
        stores = [LocalStore(iid, SLOTS, BLOCK, neighbours) for iid in ("p0", "d0")]
    else:
        stores = [ShmStore("test", iid, SLOTS, BLOCK, directory=str(tmp_path)) for iid in ("p0", "d0")]
    yield stores
    for store in stores:
        store.close()


def test_blocks_arrive_in_order_with_the_digest_over_all(pair):
    sender, receiver = pair
    handle, digest = sender.put(3, writer(block(1), block(2), block(3)))
    assert digest == xxhash.xxh3_64_intdigest(block(1) + block(2) + block(3))
    assert sender.free_slots == SLOTS - 3
    assert [bytes(view) for view in receiver.take(handle, digest)] == [block(1), block(2), block(3)]
    assert [bytes(view) for view in receiver.take(handle, digest)] == [block(1), block(2), block(3)]
    sender.free(handle)
    assert sender.free_slots == SLOTS


def test_the_copy_is_the_receivers_own(pair):
    sender, receiver = pair
    handle, digest = sender.put(1, writer(block(1)))
    (view,) = receiver.take(handle, digest)
    sender.free(handle)
    sender.put(1, writer(block(2)))
    assert bytes(view) == block(1)


def test_a_store_takes_from_itself(pair):
    sender, _ = pair
    handle, digest = sender.put(2, writer(block(1), block(2)))
    assert [bytes(view) for view in sender.take(handle, digest)] == [block(1), block(2)]


def test_a_freed_or_reused_slot_is_lost(pair):
    sender, receiver = pair
    handle, digest = sender.put(1, writer(block(1)))
    sender.free(handle)
    with pytest.raises(KVLost, match="generation 2, not 1"):
        receiver.take(handle, digest)
    again, _ = sender.put(1, writer(block(1)))
    assert again.slots == handle.slots
    with pytest.raises(KVLost):  # even with the same bytes in it
        receiver.take(handle, digest)


def test_a_slot_reused_during_the_copy_is_lost_not_corrupt(pair, monkeypatch):
    sender, receiver = pair
    handle, digest = sender.put(2, writer(block(1), block(2)))
    from tetri.kv import slab

    class Slow:
        """Between the first block's copy and the second's the sender gives the slots to another chunk."""

        def __init__(self):
            self._real = xxhash.xxh3_64()
            self._first = True

        def update(self, view):
            if self._first:
                self._first = False
                monkeypatch.undo()
                sender.free(handle)
                sender.put(2, writer(block(8), block(9)))
            self._real.update(view)

        def intdigest(self):
            return self._real.intdigest()

    monkeypatch.setattr(slab, "xxh3_64", Slow)
    with pytest.raises(KVLost):
        receiver.take(handle, digest)


def test_a_wrong_digest_is_corrupt(pair):
    sender, receiver = pair
    handle, digest = sender.put(1, writer(block(1)))
    with pytest.raises(KVCorrupt, match=f"announced {digest ^ 1:016x}"):
        receiver.take(handle, digest ^ 1)
    assert bytes(receiver.take(handle, digest)[0]) == block(1)


def test_swapped_blocks_are_corrupt(pair):
    sender, receiver = pair
    handle, digest = sender.put(2, writer(block(1), block(2)))
    swapped = replaced(handle, slots=handle.slots[::-1], generations=handle.generations[::-1])
    with pytest.raises(KVCorrupt):
        receiver.take(swapped, digest)


FORGED = {
    "slot beyond the slab": {"slots": [SLOTS]},
    "slot far beyond": {"slots": [(1 << 64) - 1]},
    "negative slot": {"slots": [-1]},
    "negative generation": {"generations": [-1]},
    "huge generation": {"generations": [1 << 63]},
    "fewer generations": {"generations": []},
    "more slots": {"slots": [0, 1]},
    "a slot twice": {"slots": [0, 0], "generations": [1, 1]},
    "a slot a million times": {"slots": [0] * 1_000_000, "generations": [1] * 1_000_000},
    "other block size": {"block_bytes": BLOCK + 1},
    "no block size": {"block_bytes": 0},
    "huge block size": {"block_bytes": 1 << 62},
    "unknown segment": {"segment": "tetri-test-p0-0123456789abcdef"},
    "no segment": {"segment": ""},
    "another's file": {"segment": "../../etc/passwd"},
    "zero byte": {"segment": "tetri-test-p0\0"},
    "endless name": {"segment": "tetri-test-" + "x" * 100_000},
}


@pytest.mark.parametrize("fields", FORGED.values(), ids=FORGED.keys())
def test_a_forged_handle_is_lost(pair, fields):
    sender, receiver = pair
    handle, digest = sender.put(1, writer(block(1)))
    with pytest.raises(KVLost) as caught:
        receiver.take(replaced(handle, **fields), digest)
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()


def test_freeing_twice_or_anothers_is_an_error_and_frees_nothing(pair):
    sender, receiver = pair
    first, _ = sender.put(2, writer(block(1), block(2)))
    second, _ = sender.put(1, writer(block(3)))
    other, _ = receiver.put(1, writer(block(4)))
    sender.free(first)
    for wrong in (
        first,
        other,
        replaced(second, slots=[*second.slots, 99], generations=[1, 1]),
        replaced(second, slots=second.slots + first.slots, generations=[1, 2, 2]),
        replaced(second, generations=[7]),
    ):
        with pytest.raises(KVError, match="cannot free"):
            sender.free(wrong)
    assert sender.free_slots == SLOTS - 1
    sender.free(second)


def test_too_few_free_slots_is_an_error_and_takes_none(pair):
    sender, _ = pair
    sender.put(SLOTS - 1, lambda views: None)
    with pytest.raises(KVError, match="2 slots asked, 1 are free"):
        sender.put(2, lambda views: None)
    assert sender.free_slots == 1


def test_a_write_that_fails_takes_no_slots(pair):
    sender, receiver = pair
    stale = []

    def fail(views):
        views[0][:] = block(1)
        stale.extend(views)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        sender.put(2, fail)
    assert sender.free_slots == SLOTS
    handle, digest = sender.put(SLOTS, lambda views: None)
    assert len(receiver.take(handle, digest)) == SLOTS


def test_no_blocks_at_all_are_a_chunk_too(pair):
    sender, receiver = pair
    handle, digest = sender.put(0, lambda views: None)
    assert list(receiver.take(handle, digest)) == []
    sender.free(handle)


def test_a_closed_store_is_gone_and_closing_twice_is_fine(pair):
    sender, receiver = pair
    handle, digest = sender.put(1, writer(block(1)))
    sender.close()
    sender.close()
    with pytest.raises(KVLost):
        receiver.take(handle, digest)


def test_open_store_knows_its_transports():
    store = open_store("local", "d", "p0", 2, 10)
    assert (store.transport, store.slots, store.free_slots) == ("local", 2, 2)
    store.close()
    with pytest.raises(KVError, match="unknown KV transport 'carrier pigeon'"):
        open_store("carrier pigeon", "d", "p0", 2, 10)


class History(RuleBasedStateMachine):
    """Random puts, takes and frees against a plain dictionary of what each chunk must hold."""

    def __init__(self):
        super().__init__()
        self.sender, self.receiver = self.make()
        self.live = []
        self.freed = []
        self.serial = 0

    def make(self):
        neighbours = {}
        return [LocalStore(iid, SLOTS, BLOCK, neighbours) for iid in ("p0", "d0")]

    def teardown(self):
        self.sender.close()
        self.receiver.close()

    @rule(count=st.integers(0, SLOTS))
    def put(self, count):
        self.serial += 1
        blocks = [bytes([self.serial % 256, at]) * (BLOCK // 2) for at in range(count)]
        if count > self.sender.free_slots:
            with pytest.raises(KVError):
                self.sender.put(count, writer(*blocks))
            return
        self.live.append((*self.sender.put(count, writer(*blocks)), blocks))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), wrong=st.integers(0, 3))
    def take(self, data, wrong):
        handle, digest, blocks = data.draw(st.sampled_from(self.live))
        if wrong:
            with pytest.raises(KVCorrupt):
                self.receiver.take(handle, digest ^ wrong)
        else:
            assert [bytes(view) for view in self.receiver.take(handle, digest)] == blocks

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data):
        chunk = data.draw(st.sampled_from(self.live))
        self.live.remove(chunk)
        self.sender.free(chunk[0])
        if chunk[0].slots:
            self.freed.append(chunk)

    @precondition(lambda self: self.freed)
    @rule(data=st.data())
    def use_what_was_freed(self, data):
        handle, digest, _ = data.draw(st.sampled_from(self.freed))
        with pytest.raises(KVLost):
            self.receiver.take(handle, digest)
        with pytest.raises(KVError):
            self.sender.free(handle)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def forge(self, data):
        handle, digest, blocks = data.draw(st.sampled_from(self.live))
        numbers = st.lists(st.integers(-2, SLOTS + 2), max_size=3)
        forged = replaced(handle, slots=data.draw(numbers), generations=data.draw(numbers))
        with suppress(KVLost, KVCorrupt):
            assert [bytes(view) for view in self.receiver.take(forged, digest)] == blocks

    @rule()
    def forget(self):
        self.receiver.forget(self.sender.put(0, writer())[0].segment)

    @invariant()
    def slots_add_up(self):
        assert self.sender.free_slots == SLOTS - sum(len(blocks) for _, _, blocks in self.live)
        assert self.receiver.free_slots == SLOTS


class ShmHistory(History):
    def make(self):
        return [ShmStore("test", iid, SLOTS, BLOCK, staging=0) for iid in ("p0", "d0")]


LocalHistories = History.TestCase
LocalHistories.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
ShmHistories = ShmHistory.TestCase
ShmHistories.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
