"""The reader and the slab of `cuda_ipc`: what is opened when, what is closed when, and what goes wrong. Runs on the
stand-in, which raises Misuse wherever CUDA would leave undefined what happens."""

import time

import msgspec
import pytest

from tests.kv.contract import StoreContract
from tests.kv.cuda.stand_in import StandIn
from tests.kv.cuda.world import CudaWorld, counted, cuda
from tests.kv.parties import BLOCK, SLOTS, block
from tetri.kv import StoreSettings, enabled, open_store
from tetri.kv.base import KVError, KVForeign, KVLost, Wanted
from tetri.kv.cuda.ipc import PATH
from tetri.kv.cuda.runtime import Device
from tetri.kv.cuda.slab import TICKET


class TestCuda(StoreContract):
    @pytest.fixture(params=["device engine", "host engine", "two GPUs"])
    def world(self, tmp_path, request):
        world = CudaWorld(tmp_path, request.param == "host engine", 2 if request.param == "two GPUs" else 1)
        yield world
        world.close()
        assert list(world.cards.iterdir()) == []


def test_a_peer_and_its_events_are_opened_once_and_closed_when_it_goes(pair):
    sender, receiver = pair
    names = ("ipcOpenMemHandle", "ipcOpenEventHandle", "ipcCloseMemHandle", "eventDestroy")
    made = [counted(receiver, name) for name in names]
    chunk = sender.put(block(1), block(2))
    assert made == [[]] * 4, "not before it is needed"
    for _ in range(5):
        receiver.fetch(chunk)
        receiver.meet(sender)
    assert [len(each) for each in made] == [1, 1, 0, 0]
    for _ in range(2):
        receiver.store.part("p0")
        assert [len(each) for each in made] == [1, 1, 1, 1]


def test_the_own_slab_is_read_directly_and_never_opened(world):
    mixed = world.open("m0")
    mixed.meet(mixed)
    chunk = mixed.put(block(1), block(2))
    fetched = mixed.store.fetch(Wanted(("x", 0), "m0", "local", chunk.handle, chunk.digest))
    assert [each.get().tobytes() for each in fetched.blocks] == [block(1), block(2)]
    with pytest.raises(KVForeign, match="path local"):
        mixed.fetch(chunk)
    assert not cuda(mixed).locks


@pytest.mark.parametrize("asked", [True, False])
def test_memory_that_is_wanted_back_is_closed_also_without_being_asked_for(world, pair, asked, monkeypatch):
    """A worker that is started again needs the GPU's memory, perhaps before the broker misses the old one."""
    monkeypatch.setattr("tetri.kv.cuda.ipc._BACK_S", 0.0)
    sender, receiver = pair
    other = world.open("p1")
    receiver.meet(other)
    chunk, kept = sender.put(block(1)), other.put(block(9))
    for each in (chunk, kept):
        receiver.fetch(each)
    opened = counted(receiver, "ipcOpenMemHandle")
    sender.kill()
    if asked:
        with pytest.raises(KVLost, match="its owner has closed it, or has ended"):
            receiver.fetch(chunk)
    else:
        receiver.hear()
    assert len(cuda(receiver).locks) == 1
    assert receiver.fetch(kept) == [block(9)] and not opened, "the other stays open"


def test_a_metadata_segment_that_others_unlink_is_read_as_before(world, pair, monkeypatch):
    """Its owner has not closed it."""
    monkeypatch.setattr("tetri.kv.cuda.ipc._BACK_S", 0.0)
    sender, receiver = pair
    chunk, late = sender.put(block(1)), world.open("d1")
    assert receiver.fetch(chunk) == [block(1)] and sender.store.counters() == {}
    (world.cards / chunk.handle.segment).unlink()
    assert sender.store.counters() == {"segment_unlinked": 1}
    late.meet(sender)
    for each in (receiver, late):
        each.hear()
        assert each.fetch(chunk) == [block(1)]
    sender.close()
    assert sender.store.counters() == {}
    with pytest.raises(KVLost, match="has closed it"):
        receiver.fetch(chunk)
    with pytest.raises(KVLost):
        late.fetch(chunk)


def test_what_is_on_its_way_when_the_sender_closes_is_lost(pair):
    """Its process may end before the copy does."""
    sender, receiver = pair
    chunk = sender.put(block(1))
    before = cuda(receiver).streamSynchronize
    cuda(receiver).streamSynchronize = lambda *args: before(*args) or sender.close()
    with pytest.raises(KVLost, match="is in generation"):
        receiver.fetch(chunk)
    late = receiver.world.open("d1")  # never had it open
    late.meet(sender)
    with pytest.raises(KVLost):
        late.fetch(chunk)


def test_everything_is_given_back(world, pair):
    sender, receiver = pair
    for count in (1, 5, 2):  # staging grows once
        receiver.fetch(sender.put(*[block(1)] * count))
        sender.give_back()
    for party in (receiver, sender):
        party.close()
        runtime = cuda(party)
        assert not runtime.pinned and not runtime.locks and not runtime.events
        assert all(kind == "closed" or shared.get().gone for shared, kind in runtime.memory.values())


def test_without_a_digest_the_sender_does_not_wait_and_nothing_goes_to_the_host(world):
    sender, receiver = world.pair(digest=False)
    waits, copies = counted(sender, "streamSynchronize"), counted(receiver, "memcpyAsync")
    chunk = sender.put(block(1), block(2))
    assert not waits
    assert receiver.fetch(chunk) == [block(1), block(2)]
    assert len(copies) == 2


def test_a_gather_that_never_ends_is_lost_and_hangs_nobody(tmp_path):
    world = CudaWorld(tmp_path, event_s=0.05)
    sender, receiver = world.pair(digest=False)
    cuda(sender).lag_s = 1e9
    slow = sender.put(block(1))
    with pytest.raises(KVLost, match="was not written within"):
        receiver.fetch(slow)
    cuda(sender).lag_s = 0.01
    assert receiver.fetch(sender.put(block(2))) == [block(2)], "the receiver's stream is none the worse"
    world.close()


def test_a_gather_that_is_late_holds_nobody_up(tmp_path):
    """The worker looks again soon, and meanwhile fetches from others. Who is parted from is not waited for."""
    world = CudaWorld(tmp_path, event_s=1e9)
    sender, receiver = world.pair(digest=False)
    other = world.open("p1", digest=False)
    receiver.meet(other)
    assert receiver.store.due() is None
    cuda(sender).lag_s = 1e9
    late = receiver.ask(sender.put(block(1)))
    assert receiver.fetch(other.put(block(2))) == [block(2)] and late in receiver.waiting
    assert receiver.store.due() < time.monotonic() + 0.1
    for event, *_ in cuda(sender).events.values():
        event.set(done_at=0.0)
    world.settle()
    assert receiver.got(late) == [block(1)] and receiver.store.due() is None
    late = receiver.ask(sender.put(block(4)))
    receiver.store.part("p0")
    receiver.meet(world.open("p0", digest=False))
    world.settle()
    with pytest.raises(KVLost, match="p0 is gone"):
        receiver.got(late)
    world.close()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"tickets": {}}, "a ticket of 0 bytes"),
        ({"tickets": {PATH: b"x" * (TICKET.size + 1)}}, "a ticket of"),
        ({"tickets": {PATH: TICKET.pack(SLOTS + 1, BLOCK, bytes(64))}}, "slots, the ticket says"),
        ({"tickets": {PATH: TICKET.pack(SLOTS, BLOCK, bytes(64))}}, "cannot be opened: cudaError"),
        ({"device": "GPU-elsewhere"}, "no peer access"),
        ({"segment": "tetri-test-p0-0123456789abcdef"}, "the handle is of"),
    ],
)
def test_a_reach_that_is_wrong_is_lost_and_leaves_nothing_open(world, changed, says):
    sender, receiver = world.open("p0"), world.open("d0")
    receiver.store.meet("p0", msgspec.structs.replace(sender.store.reach, **changed))
    with pytest.raises((KVLost, KVForeign), match=says):
        receiver.fetch(sender.put(block(1)))
    assert not cuda(receiver).locks


def test_the_reach_says_where_the_slab_is(world):
    reach = world.open("p0").store.reach
    assert (reach.paths, reach.device, reach.near) == ([PATH], world.device().uuid, [])
    assert list(reach.tickets) == [PATH] and len(reach.tickets[PATH]) == TICKET.size


def test_settings_with_a_gpu_mean_cuda_ipc(tmp_path):
    device = Device(StandIn(tmp_path))
    made = StoreSettings("test-cuda", "p0", 2, 100, device=device)
    assert enabled(made) == [PATH]
    assert enabled(StoreSettings("test-cuda", "p0", 2, 100, transport="shm", device=device)) == ["shm"]
    store = open_store(made)
    assert (store.reach.paths, store.reach.device) == ([PATH], device.uuid)
    with pytest.raises(KVError, match="gpu = 0"):
        open_store(StoreSettings("test-cuda", "p0", 2, 100, transport="cuda_ipc"))
    handle, digest = store.put(1, lambda views: views[0].__setitem__(slice(None), b"x" * 100))
    assert digest is not None
    store.free(handle)
    store.close()
