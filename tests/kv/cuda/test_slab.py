"""The slab in a GPU's memory: what every slab promises, its events, and when its memory is given back."""

import threading

import pytest

from tests.kv.contract_slab import SlabContract, slab_histories
from tests.kv.cuda.stand_in import StandIn
from tests.kv.cuda.world import CudaWorld, calls, counted, device_of
from tests.kv.parties import BLOCK, SLOTS, block
from tetri.kv.base import KVError, KVLost
from tetri.kv.cuda.runtime import Device
from tetri.kv.cuda.slab import DeviceSlab


def slab_in(folder, device=None, slots=SLOTS, block_bytes=BLOCK):
    return DeviceSlab(device or Device(StandIn(folder)), "test", "p0", slots, block_bytes, directory=str(folder))


class TestCudaSlab(SlabContract):
    @pytest.fixture
    def slab(self, tmp_path):
        slab = slab_in(tmp_path)
        yield slab
        slab.close()


def test_histories_of_a_device_slab(tmp_path):
    slab_histories(lambda: slab_in(tmp_path))("runTest").runTest()


def test_one_event_a_chunk_on_the_stream_of_the_gather(pair):
    sender, _ = pair
    recorded, seen = counted(sender, "eventRecord"), []
    handle, _ = sender.store.put(3, lambda views: seen.append(len(recorded)))
    ((_, stream),) = recorded
    assert seen == [0] and stream == device_of(sender).stream, "after the gather"
    sender.store.free(handle)
    assert sender.store.freed() == 3


def test_more_slots_than_events_share_them(tmp_path, monkeypatch):
    monkeypatch.setattr("tetri.kv.cuda.slab.MOST_EVENTS", 3)
    world = CudaWorld(tmp_path)
    sender, receiver = world.pair()
    chunks = [sender.put(block(number)) for number in range(SLOTS)]
    assert [receiver.fetch(chunk) for chunk in chunks] == [[block(number)] for number in range(SLOTS)]
    world.close()


def test_no_room_is_one_line_and_leaves_nothing(tmp_path):
    for folder in ("gpu", "cards"):
        (tmp_path / folder).mkdir()
    device = Device(StandIn(tmp_path / "gpu", total=8 << 20))
    with pytest.raises(KVError, match=r"cannot have 10 MB of the GPU's memory for 10 slots .* \(8 of 8 MB are free\)"):
        slab_in(tmp_path / "cards", device, 10, 1 << 20)
    assert list((tmp_path / "cards").iterdir()) == []


def test_slabs_are_allocations_of_their_own(tmp_path):
    """The driver packs small ones together, and a handle would open the neighbours as well."""
    device = Device(StandIn(tmp_path))
    asked = calls(device.runtime, "malloc")
    slab_in(tmp_path, device).close()
    assert asked == [(2 << 20,)]


@pytest.mark.parametrize("parts", [True, False])
def test_memory_is_given_back_once_the_last_reader_has_closed_it_else_when_the_process_ends(pair, caplog, parts):
    sender, receiver = pair
    chunk = sender.put(block(1))
    receiver.fetch(chunk)
    if parts:
        receiver.store.part("p0")
    freed, base = counted(sender, "free"), sender.store.slab.memory.base
    sender.close()
    assert ((base,) in freed, "still open in another process" in caplog.text) == (parts, not parts)
    with pytest.raises(KVLost):  # and what is in it is no longer announced
        receiver.fetch(chunk)


def test_a_closing_sender_waits_for_readers_that_hear(tmp_path):
    world = CudaWorld(tmp_path, patience_s=20.0)
    sender, receiver = world.pair()
    receiver.fetch(sender.put(block(1)))
    freed, base = counted(sender, "free"), sender.store.slab.memory.base
    receiver.hear()
    later = threading.Timer(0.1, receiver.store.part, ["p0"])
    later.start()
    sender.give_back()
    sender.close()
    later.join()
    assert (base,) in freed
    world.close()
