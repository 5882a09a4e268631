"""The path `stream` as its threads and sockets run it: a bad network, keys, and what is left behind."""

import gc
import os
import threading
import time
from contextlib import closing

import pytest
import zmq
from live import wait_until
from msgspec.structs import replace
from relay import Relay, Weather

from tests.kv.contract import StoreContract
from tests.kv.stream.world import StreamWorld, big
from tetri.kv import StoreSettings, open_store
from tetri.kv.base import KVError, KVLost
from tetri.kv.local import LocalSlab
from tetri.kv.stream.fetch import Fetching, StreamPatience
from tetri.kv.stream.stream import StreamReader, StreamSettings
from tetri.net import keys
from tetri.wire import codec
from tetri.wire.bulk import Fetch

MB = 1 << 20
QUICK = StreamPatience(stall_s=0.2, lost_s=0.6)


class TestStream(StoreContract):
    World = StreamWorld


def relayed(world, blocks, **options):
    """(sender, receiver, relay); the receiver reaches the sender over the relay alone."""
    sender, receiver = world.open("p0", block_bytes=MB, slots=blocks), world.open("d0", block_bytes=MB)
    relay = Relay(sender.store.reach.address, **options)
    receiver.store.meet("p0", replace(sender.store.reach, address=f"tcp://127.0.0.1:{relay.port}"))
    return sender, receiver, relay


def test_a_host_that_falls_silent_is_asked_again_over_another_connection(world):
    world.set(patience=StreamPatience(stall_s=0.3, lost_s=10.0))
    sender, receiver, relay = relayed(world, 8)
    with relay:
        assert receiver.fetch(sender.put(big(1))) == [big(1)]
        relay.weather.silent = True
        ticket = receiver.ask(sender.put(big(2)))
        wait_until(lambda: relay.connections > 1, "no other connection")
        relay.weather.silent = False
        relay.cut()
        world.settle()
        assert receiver.got(ticket) == [big(2)]


def test_a_path_that_is_cut_is_lost_slowly_once_then_soon_and_read_again_when_it_is_back(world):
    """Only the bytes go through the relay: all else of the hand-over passes."""
    slow = StreamPatience(stall_s=0.2, lost_s=2.0, again_s=0.2)
    world.set(patience=slow)
    sender, receiver, relay = relayed(world, 8)
    with relay:
        chunk = sender.put(big(1))
        relay.weather.silent = True
        for patience_s in (slow.lost_s, slow.again_s, slow.again_s):
            start, ticket = time.monotonic(), _asked(world, receiver, chunk)
            assert isinstance(receiver.answers[ticket], KVLost) and time.monotonic() - start >= patience_s
        relay.weather.silent = False
        relay.cut()
        world.wait(lambda: receiver.answers[_asked(world, receiver, chunk)] == [big(1)], "it is not read again")


def _asked(world, receiver, chunk):
    """The ticket of a fetch that has ended."""
    ticket = receiver.ask(chunk)
    world.settle()
    return ticket


def test_what_is_damaged_on_the_way_does_not_arrive_and_the_rest_comes_over_another_connection(world):
    sender, receiver, relay = relayed(world, 8)
    with relay:
        chunk = sender.put(*(big(number) for number in range(8)))
        relay.weather.flip_at = 3 * MB
        assert receiver.fetch(chunk) == list(chunk.blocks)
        assert relay.connections == 2


def test_a_sender_that_dies_is_lost_in_time_and_its_successor_is_another(world):
    world.set(patience=QUICK)
    sender, receiver, relay = relayed(world, 32, weather=Weather(rate=20 * MB))
    with relay:
        tickets = [receiver.ask(sender.put(*(big(at) for at in range(4)))) for _ in range(8)]
        wait_until(lambda: relay.forwarded > 2 * MB, "nothing comes")
        sender.close()
        start = time.monotonic()
        world.settle()
        assert time.monotonic() - start < 5 * QUICK.lost_s
        assert all(isinstance(receiver.answers[ticket], KVLost) for ticket in tickets[-4:])
    again = world.open("p0", block_bytes=MB)
    receiver.meet(again)
    assert receiver.fetch(again.put(big(5))) == [big(5)]


def test_streams_and_their_fetches_leave_nothing_open(tmp_path):
    def once():
        world = StreamWorld(tmp_path)
        sender, receiver = world.pair(slots=4, block_bytes=100_000)
        opened = []
        for number in range(20):
            chunk = sender.put(big(number, 100_000), big(number + 1, 100_000))
            assert receiver.fetch(chunk) == list(chunk.blocks)
            sender.free(chunk)
            world.wait(lambda: sender.store.free_slots == 4, "slots that libzmq does not let go of")
            opened.append((len(os.listdir("/proc/self/fd")), threading.active_count()))
        assert opened[-1] == opened[0]
        world.close()

    once()
    gc.collect()
    descriptors, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(10):
        once()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= descriptors and threading.active_count() == threads


def test_closing_in_the_middle_ends_soon(world):
    sender, receiver, relay = relayed(world, 40, weather=Weather(rate=5 * MB))
    with relay:
        for _ in range(10):
            receiver.ask(sender.put(*(big(at) for at in range(4))))
        wait_until(lambda: relay.forwarded > MB, "nothing comes")
        for party in (sender, receiver):
            start = time.monotonic()
            party.close()
            assert time.monotonic() - start < 5.0, "all of it takes eight"
            party.store.close()


def test_a_thread_that_dies_takes_the_worker_with_it(world, monkeypatch):
    monkeypatch.setattr(Fetching, "meet", lambda *what: 1 / 0)
    receiver = world.open("d0")
    receiver.meet(receiver)
    with pytest.raises(ZeroDivisionError):
        world.wait(lambda: False, "the thread lives")
    world.parties.clear()
    receiver.close()


def test_an_address_is_as_announced_and_who_has_another_key_reads_nothing(tmp_path, world):
    world.set(announce="tcp://127.0.0.1:7")
    assert world.open("a0").store.reach.address == "tcp://127.0.0.1:7"
    world.set(patience=QUICK)
    sender = world.open("p0", block_bytes=3 * MB)
    chunk = sender.put(big(1, 3 * MB), big(2, 3 * MB))
    keys.generate(str(tmp_path / "other"))
    world.set(key=str(tmp_path / "other"), patience=QUICK)
    outsider = world.open("x0")
    outsider.meet(sender)
    with pytest.raises(KVLost):
        outsider.fetch(chunk)


def test_without_the_key_a_local_process_reads_nothing(world):
    """It knows the port, the frames and the handle, as every user of this host may."""
    sender, receiver = world.pair(block_bytes=MB)
    chunk = sender.put(big(1))
    fetch = Fetch(number=1, lane=1, handle=chunk.handle, start=0, credit=1 << 30)
    with zmq.Context() as strange, strange.socket(zmq.DEALER) as plain:
        plain.set(zmq.LINGER, 0)
        plain.connect(sender.store.reach.address)
        plain.send(codec.encode(fetch))
        assert receiver.fetch(chunk) == [big(1)]  # after the stranger, over the same server
        assert not plain.poll(500)
    counters = sender.store.counters()
    assert {name for name in counters if "served" in name} == {"stream_served_bytes", "stream_served_pieces"}


def test_what_cannot_be_served_is_one_line(world):
    before, settings = threading.active_count(), {"is no address": {"key": world.key, "address": "nonsense"}}
    settings |= {"/no/such/key: .* tetri-cli keygen": {"key": "/no/such/key"}, "needs a key: make one with": {}}
    for says, wrong in settings.items():
        with pytest.raises(KVError, match=f"^KV path stream: .*{says}") as caught:
            StreamReader(LocalSlab("p0", 1, 1, {}), StreamSettings(**wrong), lambda: None)
        assert "\n" not in str(caught.value)
    assert threading.active_count() == before


def test_a_worker_has_the_path_by_name_or_when_it_has_an_address(world):
    auto = {("auto", "tcp://127.0.0.1:*"): ["shm", "stream"], ("auto", ""): ["shm"]}
    for (transport, address), paths in {("stream", ""): ["stream"], **auto}.items():
        settings = StoreSettings("t-stream", "p0", 2, 100, transport, address, key=world.key)
        with closing(open_store(settings)) as store:
            assert [path for path in store.reach.paths if path != "nixl"] == paths
            assert store.reach.address.startswith("tcp://127.0.0.1:") == ("stream" in paths)
