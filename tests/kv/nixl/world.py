"""Stores that reach each other over nixl, in this process and in others."""

import os
import subprocess
import sys

from tests.kv.parties import Chunk, World, block
from tetri.instance import Reach
from tetri.kv.local import LocalReader
from tetri.kv.nixl.reader import open_nixl
from tetri.kv.segment import sweep
from tetri.kv.shm import ShmSlab
from tetri.kv.store import Store
from tetri.wire.handover import Handle

BLOCK = 300_000  # bytes in an owner's block
DEPLOYMENT = f"nixl-{os.getpid()}"

OWNER = f"""
import sys
from tests.kv.parties import block
from tetri.kv import StoreSettings, open_store
store = open_store(StoreSettings("{DEPLOYMENT}", "p0", 8, {BLOCK}, "nixl", sys.argv[2]))
def write(views):
    for number, view in enumerate(views):
        view[:] = block(int(sys.argv[1]) + number, {BLOCK})
handle, digest = store.put(4, write)
print(store.reach.segment, store.reach.tickets["nixl"].hex(), digest, *handle.slots, *handle.generations, flush=True)
sys.stdin.readline()
"""


class Owner:
    """Another process with four blocks in its slab. `inside`: what stands before its command."""

    def __init__(self, number=1, address="", inside=()):
        command = [*inside, sys.executable, "-c", OWNER, str(number), address]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        segment, ticket, *words = self.process.stdout.readline().split()
        digest, *places = map(int, words)
        handle = Handle(segment=segment, slots=places[:4], generations=places[4:], block_bytes=BLOCK)
        self.chunk = Chunk("p0", handle, digest, tuple(block(number + at, BLOCK) for at in range(4)))
        self.reach = Reach(paths=["nixl"], host="", process=0, segment=segment, tickets={"nixl": bytes.fromhex(ticket)})

    def kill(self):
        self.process.kill()
        self.process.communicate()
        sweep(DEPLOYMENT)


class NixlWorld(World):
    path = "nixl"

    def __init__(self, folder):
        super().__init__(folder)
        self.threads = len(os.listdir("/proc/self/task"))

    def store(self, iid, wake, slots, block_bytes, digest):
        slab = ShmSlab("test", iid, slots, block_bytes, self.folder, digest)
        reader, ticket = open_nixl(slab, 4 * block_bytes, wake, everywhere=False)
        reach = Reach(paths=["nixl"], host="here", process=1, segment=slab.segment.name, tickets={"nixl": ticket})
        return Store(slab, {"nixl": reader}, reach, LocalReader({slab.segment.name: slab.segment}))

    def close(self):
        super().close()
        assert len(os.listdir("/proc/self/task")) <= self.threads + 1, "threads left"  # UCX keeps one for the process
