"""The path over nixl between processes: peers that die, hang and come back, over shared memory and over TCP."""

import os
import signal
import subprocess
import sys
import threading
import time

import msgspec
import pytest

from tests.kv.parties import PATIENCE_S, Chunk, Party, World, block
from tetri.kv import StoreSettings, open_store
from tetri.kv.base import KVLost
from tetri.kv.nixl import agent as nixl_agent
from tetri.kv.nixl import mover as nixl_mover
from tetri.kv.nixl.reader import Ticket
from tetri.kv.segment import sweep
from tetri.request import Reach
from tetri.wire.codec import VERSION, decode
from tetri.wire.handover import Handle

SLOTS, BLOCK = 8, 300_000

OWNER = f"""
import sys
from tests.kv.parties import block
from tetri.kv import StoreSettings, open_store
store = open_store(StoreSettings("nixl-{os.getpid()}", "p0", {SLOTS}, {BLOCK}, "nixl", sys.argv[2]))
def write(views):
    for number, view in enumerate(views):
        view[:] = block(int(sys.argv[1]) + number, {BLOCK})
handle, digest = store.put(4, write)
print(store.reach.segment, store.reach.tickets["nixl"].hex(), digest, *handle.slots, *handle.generations, flush=True)
for line in sys.stdin:
    getattr(store, line.strip())(*[handle] if line == "free\\n" else [])
    print("done", flush=True)
"""


class Owner:
    """Another process with four blocks in its slab. `inside`: what stands before its command."""

    def __init__(self, number=1, address="", inside=()):
        self.blocks = [block(number + at, BLOCK) for at in range(4)]
        command = [*inside, sys.executable, "-c", OWNER, str(number), address]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        segment, ticket, *words = self.process.stdout.readline().split()
        self.digest, *places = map(int, words)
        self.handle = Handle(segment=segment, slots=places[:4], generations=places[4:], block_bytes=BLOCK)
        self.reach = Reach(paths=["nixl"], host="", process=0, segment=segment, tickets={"nixl": bytes.fromhex(ticket)})

    def say(self, verb):
        self.process.stdin.write(verb + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class NixlWorld(World):
    path = "nixl"

    def store(self, iid, wake, slots, block_bytes, digest):
        return open_store(StoreSettings(f"nixl-{os.getpid()}", iid, slots, block_bytes, "nixl", digest=digest), wake)

    def fetch(self, receiver: Party, owner, **changed):
        ticket = self.ask(receiver, owner, **changed)
        self.wait(lambda: ticket not in receiver.waiting, "a take without an answer")
        return receiver.got(ticket)

    def ask(self, receiver, owner, **changed):
        return receiver.ask(Chunk("p0", owner.handle, owner.digest, ()), **changed)


@pytest.fixture
def owners():
    """Makes owners, and ends them."""
    made = []

    def start(*arguments):
        made.append(Owner(*arguments))
        return made[-1]

    yield start
    for owner in made:
        if owner.process.poll() is None:
            owner.process.send_signal(signal.SIGCONT)
            owner.kill()
    sweep(f"nixl-{os.getpid()}")  # what killed owners leave


@pytest.fixture
def world(request, monkeypatch):
    """Indirectly: over which of UCX's transports; all, unless it is said."""
    if getattr(request, "param", "all") != "all":
        monkeypatch.setenv("UCX_TLS", request.param)
    threads = len(os.listdir("/proc/self/task"))
    world = NixlWorld()
    yield world
    world.close()
    assert len(os.listdir("/proc/self/task")) <= threads + 1, "threads left"  # UCX keeps one for the process


@pytest.fixture
def receiver(world):
    return world.open("d0", block_bytes=BLOCK)


BOTH = pytest.mark.parametrize("world", ["all", "tcp"], indirect=True)


def meet(receiver, owner):
    receiver.store.meet("p0", owner.reach)


@BOTH
def test_a_killed_peer_is_lost_and_others_go_on(world, receiver, owners):
    owner, other = owners(), owners(50)
    meet(receiver, owner)
    receiver.store.meet("p1", other.reach)
    for _ in range(3):
        assert world.fetch(receiver, owner) == owner.blocks
    tickets = [world.ask(receiver, owner) for _ in range(20)]
    owner.kill()
    tickets += [world.ask(receiver, owner) for _ in range(20)]
    start = time.monotonic()
    world.settle()
    assert time.monotonic() - start < nixl_mover.TIMEOUT_S / 2
    for ticket in tickets:
        answer = receiver.answers[ticket]
        assert isinstance(answer, KVLost) or answer == owner.blocks
    for _ in range(3):
        with pytest.raises(KVLost):
            world.fetch(receiver, owner)
        assert world.fetch(receiver, other, peer="p1") == other.blocks


@BOTH
def test_a_restarted_peer_is_read_anew_and_its_old_agent_does_no_harm(world, receiver, owners):
    """Peers that kept a dead one's agent have crashed on its return (vllm#49238, nixl#1986)."""
    for number in range(2):
        owner = owners(10 * number)
        meet(receiver, owner)
        assert world.fetch(receiver, owner) == owner.blocks
        old = world.ask(receiver, owner)
        owner.kill()
        again = owners(10 * number + 5)
        meet(receiver, again)
        new = world.ask(receiver, again)
        world.settle()
        assert isinstance(receiver.answers[old], KVLost) or receiver.answers[old] == owner.blocks
        assert receiver.got(new) == again.blocks
        again.kill()


@pytest.mark.parametrize("world", ["tcp"], indirect=True)  # what is in shared memory is read without the peer
def test_a_peer_that_hangs_is_given_up_and_what_it_sends_late_harms_nothing(world, receiver, owners, monkeypatch):
    monkeypatch.setattr(nixl_mover, "TIMEOUT_S", 2.0)  # the others answer within it on a busy machine, too
    owner, other = owners(), owners(50)
    meet(receiver, owner)
    receiver.store.meet("p1", other.reach)
    assert world.fetch(receiver, owner) == owner.blocks
    owner.process.send_signal(signal.SIGSTOP)
    tickets = [world.ask(receiver, owner) for _ in range(3)]
    world.settle()
    assert all(isinstance(receiver.answers[ticket], KVLost) for ticket in tickets)
    with pytest.raises(KVLost, match=r"waited 2 s for its turn"):
        world.fetch(receiver, owner)  # its connection is not used again before the hanging reads have ended
    for _ in range(10):
        assert world.fetch(receiver, other, peer="p1") == other.blocks
    owner.process.send_signal(signal.SIGCONT)
    for _ in range(10):
        assert world.fetch(receiver, other, peer="p1") == other.blocks
    monkeypatch.setattr(nixl_mover, "TIMEOUT_S", PATIENCE_S / 2)
    assert world.fetch(receiver, owner) == owner.blocks, "one that hung once is not lost for ever"


def test_blocks_of_another_process_and_nothing_burns_a_core_while_nothing_moves(world, receiver, owners):
    owner = owners()
    meet(receiver, owner)
    assert world.fetch(receiver, owner) == owner.blocks
    before = time.process_time()
    time.sleep(0.5)  # measures, does not wait for anything
    assert time.process_time() - before < 0.1
    owner.say("free")
    with pytest.raises(KVLost, match="is in generation 2, not 1"):
        world.fetch(receiver, owner)
    owner.say("close")
    with pytest.raises(KVLost):
        world.fetch(receiver, owner)


def test_a_ticket_that_cannot_be_read_or_lies_is_lost(world, receiver, owners):
    owner, other = owners(), owners(50)
    true = decode(owner.reach.tickets["nixl"], Ticket)
    lies = [{"metadata": b""}, {"metadata": decode(other.reach.tickets["nixl"], Ticket).metadata}]
    lies += [{"generations": 4096}, {"generations": -1}]
    lies += [{"blocks": true.blocks + SLOTS * BLOCK}, {"blocks": (1 << 64) - 1}]
    tickets = [lying(true, **lie) for lie in lies]
    for ticket in (b"", b"\x02\x80", b"no MessagePack", bytes(1000), *tickets):
        with pytest.raises(KVLost):
            take_with(world, receiver, owner, ticket)
    short = decode(other.reach.tickets["nixl"], Ticket)
    for _ in range(2):  # nixl keeps the connection that it got this far with: this name stays lost, the others do not
        with pytest.raises(KVLost):
            take_with(world, receiver, other, lying(short, metadata=short.metadata[:-10]))
    meet(receiver, owner)
    assert world.fetch(receiver, owner) == owner.blocks


def lying(ticket, **lies):
    return bytes([VERSION]) + msgspec.msgpack.encode({**fields(ticket), **lies})


def take_with(world, receiver, owner, ticket):
    receiver.store.part("p0")
    receiver.store.meet("p0", Reach(**{**fields(owner.reach), "tickets": {"nixl": ticket}}))
    try:
        return world.fetch(receiver, owner)
    finally:
        receiver.store.part("p0")


def fields(record):
    return {name: getattr(record, name) for name in record.__struct_fields__}


def test_a_mistake_in_the_thread_is_an_answer_too(world, receiver, owners, capfd, monkeypatch):
    owner = owners()
    meet(receiver, owner)
    monkeypatch.setattr(nixl_agent.Agent, "read", lambda *what: 1 / 0)
    tickets = [world.ask(receiver, owner) for _ in range(3)]
    world.settle()
    tickets.append(world.ask(receiver, owner))
    world.settle()
    assert all("has failed" in str(receiver.answers[ticket]) for ticket in tickets)
    assert "Traceback" in capfd.readouterr().err


def test_more_chunks_than_there_is_memory_for_wait_for_the_worker(world, owners, monkeypatch):
    woken, wake = threading.Semaphore(0), world.news.set
    monkeypatch.setattr(world.news, "set", lambda: (woken.release(), wake()))
    owner, receiver = owners(), world.open("d0", block_bytes=BLOCK)
    meet(receiver, owner)
    tickets = [world.ask(receiver, owner) for _ in range(5 * nixl_mover.MOST_AREAS)]
    assert all(woken.acquire(timeout=PATIENCE_S) for _ in range(nixl_mover.MOST_AREAS))
    assert not woken.acquire(timeout=0.1), "another would have no memory"
    world.settle()
    assert all(receiver.got(ticket) == owner.blocks for ticket in tickets)
