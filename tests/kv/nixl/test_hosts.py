"""The path over nixl between two hosts: network namespaces whose link is cut and comes back, UCX over TCP."""

import json
import subprocess
import sys

import msgspec
import pytest
from two_hosts import DECODE, PREFILL, TwoHosts, ip

from tests.kv.nixl.world import BLOCK, Owner
from tetri.kv.segment import sweep

RECEIVER = f"""
import json, sys
import msgspec
from tests.kv.parties import Chunk, World
from tetri.kv import StoreSettings, open_store
from tetri.kv.nixl import mover as nixl_mover
from tetri.instance import Reach
from tetri.wire.handover import Handle
nixl_mover.TIMEOUT_S = 1.0
class Here(World):
    path = "nixl"
    def store(self, iid, wake, slots, block_bytes, digest):
        return open_store(StoreSettings("nixl-hosts", iid, slots, block_bytes, "nixl", "tcp://{DECODE}:*"), wake)
world = Here()
party = world.open("d0", block_bytes={BLOCK})
reach, handle, digest = msgspec.msgpack.decode(bytes.fromhex(sys.argv[1]), type=tuple[Reach, Handle, int])
chunk = Chunk("p0", handle, digest, ())
for line in sys.stdin:
    if line == "take\\n":
        ticket = party.ask(chunk)
        world.settle()
        answer = party.answers[ticket]
        said = str(answer) if isinstance(answer, Exception) else [block.hex() for block in answer]
        print(json.dumps(said), flush=True)
    else:
        party.store.part("p0")
        party.store.meet("p0", reach)
world.close()
"""


class Receiver:
    """A process on the other host."""

    def __init__(self, owner, inside):
        known = msgspec.msgpack.encode((owner.reach, owner.chunk.handle, owner.chunk.digest)).hex()
        self.right = [block.hex() for block in owner.chunk.blocks]
        command = [*inside, sys.executable, "-c", RECEIVER, known]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def say(self, verb):
        self.process.stdin.write(verb + "\n")
        self.process.stdin.flush()

    def fetch(self):
        """Whether the right bytes came; else why not."""
        self.say("take")
        answer = json.loads(self.process.stdout.readline())
        assert isinstance(answer, str) or answer == self.right
        return answer if isinstance(answer, str) else True


@pytest.fixture
def hosts(monkeypatch):
    monkeypatch.setenv("UCX_TLS", "tcp")  # otherwise it finds that both are on one machine
    with TwoHosts() as hosts:
        yield hosts


def test_a_link_that_is_cut_loses_what_is_asked_for_and_nothing_after(hosts):
    owner = Owner(1, f"tcp://{PREFILL}:*", hosts.inside("p0"))
    receiver = Receiver(owner, hosts.inside("d0"))

    def link(state):
        end = json.loads(subprocess.check_output(["ip", "-n", hosts.names["d0"], "-j", "link", "show", "type", "veth"]))
        ip("-n", hosts.names["d0"], "link", "set", end[0]["ifname"], state)

    def comes_back():
        """UCX's connection sends again within seconds; until then a take is lost by its time limit."""
        assert any(receiver.fetch() is True for _ in range(15))
        assert [receiver.fetch() for _ in range(5)] == [True] * 5

    try:
        receiver.say("meet")
        assert [receiver.fetch() for _ in range(3)] == [True] * 3
        link("down")
        assert "waited 1 s" in receiver.fetch()
        link("up")
        comes_back()
        link("down")
        receiver.say("meet")  # as after a restart: it has to connect anew, and cannot
        assert "cannot" in receiver.fetch() or "waited" in receiver.fetch()
        link("up")
        comes_back()
        receiver.process.stdin.close()
        assert receiver.process.wait(20) == 0
    finally:
        owner.kill()
        receiver.process.kill()
        receiver.process.stdin.close()
        receiver.process.stdout.close()
        receiver.process.wait()
        sweep("nixl-hosts")
