"""The path over nixl: peers that die, hang and come back, over shared memory and TCP; false tickets; the thread."""

import signal
import threading
import time

import pytest
from msgspec import msgpack
from msgspec.structs import asdict, replace

from tests.kv.contract import assert_right_or
from tests.kv.nixl.world import BLOCK
from tests.kv.parties import BLOCK as SMALL
from tests.kv.parties import PATIENCE_S, SLOTS, block
from tetri.kv.base import KVLost
from tetri.kv.nixl import agent as nixl_agent
from tetri.kv.nixl import mover as nixl_mover
from tetri.kv.nixl.reader import Ticket
from tetri.wire.codec import VERSION, decode

OVER_TCP = pytest.mark.parametrize("world", ["tcp"], indirect=True)


@pytest.fixture
def receiver(world):
    return world.open("d0", block_bytes=BLOCK)


@pytest.fixture
def other(world, receiver):
    """A chunk of another peer, which goes on."""
    sender = world.open("p1", block_bytes=BLOCK)
    receiver.meet(sender)
    return sender.put(block(50, BLOCK))


@pytest.mark.parametrize("world", ["all", "tcp"], indirect=True)
def test_a_killed_peer_is_lost_and_others_go_on(world, receiver, owners, other):
    owner = owners()
    chunk = owner.chunk
    receiver.store.meet("p0", owner.reach)
    for _ in range(3):
        assert receiver.fetch(chunk) == list(chunk.blocks)
    tickets = [receiver.ask(chunk) for _ in range(20)]
    owner.kill()
    tickets += [receiver.ask(chunk) for _ in range(20)]
    start = time.monotonic()
    world.settle()
    assert time.monotonic() - start < nixl_mover.TIMEOUT_S / 2
    assert_right_or(KVLost, receiver, [(ticket, chunk) for ticket in tickets])
    for _ in range(3):
        with pytest.raises(KVLost):
            receiver.fetch(chunk)
        assert receiver.fetch(other) == list(other.blocks)


@OVER_TCP
def test_a_restarted_peer_is_read_anew_and_its_old_agent_does_no_harm(world, receiver, owners):
    """Peers that kept a dead one's agent have crashed on its return (vllm#49238, nixl#1986)."""
    owner = owners()
    receiver.store.meet("p0", owner.reach)
    for number in (10, 20):
        assert receiver.fetch(owner.chunk) == list(owner.chunk.blocks)
        old = receiver.ask(owner.chunk)
        owner.kill()
        again = owners(number)
        receiver.store.meet("p0", again.reach)
        new = receiver.ask(again.chunk)
        world.settle()
        assert_right_or(KVLost, receiver, [(old, owner.chunk)])
        assert receiver.got(new) == list(again.chunk.blocks)
        owner = again


@OVER_TCP  # what is in shared memory is read without the peer
def test_a_peer_that_hangs_is_given_up_and_what_it_sends_late_harms_nothing(
    world, receiver, owners, other, monkeypatch
):
    monkeypatch.setattr(nixl_mover, "TIMEOUT_S", 2.0)  # the others answer within it on a busy machine, too
    owner = owners()
    chunk = owner.chunk
    receiver.store.meet("p0", owner.reach)
    assert receiver.fetch(chunk) == list(chunk.blocks)
    owner.process.send_signal(signal.SIGSTOP)
    tickets = [receiver.ask(chunk) for _ in range(3)]
    world.settle()
    assert all(isinstance(receiver.answers[ticket], KVLost) for ticket in tickets)
    with pytest.raises(KVLost, match=r"waited 2 s for its turn"):
        receiver.fetch(chunk)  # its connection is not used again before the hanging reads have ended
    for number in (signal.SIGSTOP, signal.SIGCONT):
        owner.process.send_signal(number)
        for _ in range(10):
            assert receiver.fetch(other) == list(other.blocks)
    monkeypatch.setattr(nixl_mover, "TIMEOUT_S", PATIENCE_S / 2)
    assert receiver.fetch(chunk) == list(chunk.blocks), "one that hung once is not lost for ever"


def test_nothing_burns_a_core_while_nothing_moves(pair):
    sender, receiver = pair
    assert receiver.fetch(sender.put(block(1))) == [block(1)]
    before = time.process_time()
    time.sleep(0.5)  # measures, does not wait for anything
    assert time.process_time() - before < 0.1


def test_a_slot_that_is_reused_while_it_is_read_is_lost(pair, monkeypatch):
    sender, receiver = pair
    chunk = sender.put(block(1))
    reads, before = [], nixl_agent.Agent.read

    def read(*what):
        reads.append(what)
        if len(reads) == 3:  # of the generations, of the blocks, of the generations again
            sender.free(chunk)
        return before(*what)

    monkeypatch.setattr(nixl_agent.Agent, "read", read)
    with pytest.raises(KVLost, match="in generation 2, not 1"):
        receiver.fetch(chunk)


def lying(ticket, **lies):
    return bytes([VERSION]) + msgpack.encode({**asdict(ticket), **lies})


def test_a_ticket_that_cannot_be_read_or_lies_is_lost(world, pair):
    sender, receiver = pair
    other = world.open("p1")
    chunk, others = sender.put(block(1), block(2)), other.put(block(3))
    true, short = (decode(party.store.reach.tickets["nixl"], Ticket) for party in (sender, other))

    def fetch(peer, chunk, ticket):
        receiver.store.part("p0")
        receiver.store.meet("p0", replace(peer.store.reach, tickets={"nixl": ticket}))
        return receiver.fetch(chunk, peer="p0")

    assert fetch(sender, chunk, lying(true)) == [block(1), block(2)]
    lies = [{"metadata": b""}, {"metadata": short.metadata}, {"generations": 4096}, {"generations": -1}]
    lies += [{"blocks": true.blocks + SLOTS * SMALL}, {"blocks": (1 << 64) - 1}]
    for ticket in (b"", b"\x02\x80", b"no MessagePack", bytes(1000), *(lying(true, **lie) for lie in lies)):
        with pytest.raises(KVLost):
            fetch(sender, chunk, ticket)
    for _ in range(2):  # nixl keeps the connection that it got this far with: this name stays lost, the others do not
        with pytest.raises(KVLost):
            fetch(other, others, lying(short, metadata=short.metadata[:-10]))
    assert fetch(sender, chunk, lying(true)) == [block(1), block(2)]


def test_a_mistake_in_the_thread_is_an_answer_too(world, pair, capfd, monkeypatch):
    sender, receiver = pair
    chunk = sender.put(block(1))
    monkeypatch.setattr(nixl_agent.Agent, "read", lambda *what: 1 / 0)
    tickets = [receiver.ask(chunk) for _ in range(3)]
    world.settle()
    tickets.append(receiver.ask(chunk))
    world.settle()
    assert all("has failed" in str(receiver.answers[ticket]) for ticket in tickets)
    assert "Traceback" in capfd.readouterr().err


def test_more_chunks_than_there_is_memory_for_wait_for_the_worker(world, monkeypatch):
    woken, wake = threading.Semaphore(0), world.news.set
    monkeypatch.setattr(world.news, "set", lambda: (woken.release(), wake()))
    sender, receiver = world.pair()
    chunk = sender.put(block(1))
    tickets = [receiver.ask(chunk) for _ in range(5 * nixl_mover.MOST_AREAS)]
    assert all(woken.acquire(timeout=PATIENCE_S) for _ in range(nixl_mover.MOST_AREAS))
    assert not woken.acquire(timeout=0.1), "another would have no memory"
    world.settle()
    assert all(receiver.got(ticket) == [block(1)] for ticket in tickets)
