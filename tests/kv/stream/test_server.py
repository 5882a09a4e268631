"""The server of `stream` and its receivers: those that are slow, and nonsense."""

import random
import threading

import pytest
import zmq
from live import wait_until

from tests.kv.parties import block
from tests.kv.stream.world import big
from tetri.kv.base import KVError, Wanted
from tetri.kv.stream.fetch import StreamPatience
from tetri.kv.stream.serve import Serving
from tetri.net import keys

MB = 1 << 20
UNHURRIED = StreamPatience(stall_s=5.0, lost_s=20.0)  # nobody is lost here


def test_a_receiver_that_does_not_use_what_came_takes_only_its_room(world, monkeypatch):
    world.set(buffer=8 * MB, patience=UNHURRIED)
    sender, slow = world.pair(slots=64, block_bytes=MB)
    other = world.open("d1", block_bytes=MB)
    other.meet(sender)
    receivers, before = [], Serving.sent
    monkeypatch.setattr(Serving, "sent", lambda serving, due: (receivers.append(due.peer), before(serving, due)))
    chunks = [sender.put(*(big(10 * at + n) for n in range(4))) for at in range(8)]
    tickets = [slow.ask(chunk) for chunk in chunks]  # and its engine is busy: nobody asks for what came
    wait_until(lambda: len(receivers) == 8, "two chunks fill its room")
    for chunk in chunks:
        stream, wanted = other.store.readers["stream"], Wanted(("o", 0), "p0", "stream", chunk.handle, chunk.digest)
        stream.fetch(wanted)
        other.waiting.add(("o", 0))
        wait_until(lambda: other.hear() or ("o", 0) not in other.waiting, "held up by the slow one")
    assert receivers.count(receivers[0]) == 8
    for chunk in chunks[2:]:
        sender.free(chunk)  # a fetch that waits keeps nothing: only what libzmq still sends to the other is kept
    wait_until(lambda: sender.store.free_slots == 64 - 8, "the slots of what waits are kept")
    world.settle()
    assert [isinstance(slow.answers[ticket], KVError) for ticket in tickets] == [False] * 2 + [True] * 6


@pytest.mark.parametrize("count", [1, 2], ids=["a view", "a copy"])
def test_a_worker_that_takes_slots_just_then_still_hears_that_others_came_free(world, count):
    """Small blocks that are not adjacent leave as a copy, which keeps its slots for a moment only."""
    woken = world.news  # of the sender alone
    sender = world.open("p0", slots=4)
    world.news = threading.Event()
    receiver = world.open("d0")
    receiver.meet(sender)
    ones = [sender.put(block(number)) for number in range(3)]
    for one in ones[::2]:
        sender.free(one)
    chunk, slab = sender.put(*(block(10 + number) for number in range(count))), sender.store.slab
    before = slab.let_go

    def let_go(handle):
        slab.let_go = before
        sender.free(chunk)
        freed = before(handle)
        sender.put(*[block(5)] * count)
        return freed

    slab.let_go = let_go
    assert receiver.fetch(chunk) == list(chunk.blocks)
    wait_until(woken.is_set, "nobody told the sender")


def test_a_flood_of_nonsense_at_the_server_is_counted_and_others_are_served(world):
    sender, receiver = world.pair(block_bytes=MB)
    with zmq.Context() as flooding, flooding.socket(zmq.DEALER) as socket:
        socket.set(zmq.LINGER, 0)
        keys.introduce(socket, keys.load(world.key))
        socket.connect(sender.store.reach.address)
        rng = random.Random(1)
        for number in range(2000):
            socket.send_multipart([rng.randbytes(rng.randint(0, 100)) for _ in range(1 + number % 3)])
        chunk = sender.put(big(1))
        assert receiver.fetch(chunk) == [big(1)]
        counters = sender.store.counters
        wait_until(lambda: sum(n for name, n in counters().items() if "stream_served_garbage" in name) == 2000, "lost")
