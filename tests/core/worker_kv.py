"""The KV paths of the virtual cluster (tests/core/cluster.py): one by which a chunk is there at once, and one that
takes time, as a socket does, out of order between requests, while the sender's slots stay in use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from tetri.core.actions import Adopt, Adopted
from tetri.engine.emulated import EmulatedEngine
from tetri.executor import Copies
from tetri.kv.base import Fetched, KVLost, Wanted
from tetri.kv.local import LocalReader, LocalSlab
from tetri.kv.store import Store
from tetri.request import Reach
from tetri.wire.handover import Handle

if TYPE_CHECKING:
    from tests.core.cluster import Cluster
    from tests.core.worker_node import WorkerNode


class SpoiltCopies(Copies):
    """Now and then a copy is not what was announced, is too short, or cannot be had."""

    def __init__(self, world: Cluster, engine: EmulatedEngine, store: Store) -> None:
        super().__init__(engine, store, lambda error, key, chunk: world.note(key, f"chunk {chunk}: {error}", []))
        self.world = world

    def adopt(self, action: Adopt) -> Adopted | None:
        world, faults = self.world, self.world.faults
        if world.happens(faults.corrupt):
            action = replace(action, digest=action.digest ^ 1)
        elif world.happens(faults.lose):
            gone = Handle(**{**_fields(action.handle), "generations": [0] * len(action.handle.slots)})
            action = replace(action, handle=gone)
        return super().adopt(action)

    def _adopted(self, fetched: Fetched) -> Adopted:
        if fetched.problem is None and self.world.happens(self.world.faults.shorten):
            fetched = Fetched(fetched.ticket, fetched.blocks[:-1])
        return super()._adopted(fetched)


def _fields(handle: Handle) -> dict[str, Any]:
    return {name: getattr(handle, name) for name in handle.__struct_fields__}


class SlowReader:
    """What is asked for is read later, and comes later still. Between the two the sender sends it on: it keeps the
    slots. Every take is answered once."""

    def __init__(self, node: WorkerNode) -> None:
        self.node, self.world, self.lifecycle = node, node.world, node.lifecycle
        self.way = LocalReader(self.world.segments)
        self.peers: dict[str, str] = {}  # -> segment
        self.asked: list[Wanted] = []
        self.come: list[Fetched] = []

    def meet(self, peer: str, reach: Reach) -> None:
        self.peers[peer] = reach.segment

    def part(self, peer: str) -> None:
        self.peers.pop(peer, None)
        for wanted in [wanted for wanted in self.asked if wanted.peer == peer]:
            self._answer(wanted, Fetched(wanted.ticket, problem=KVLost(f"{peer} is gone")))

    def fetch(self, wanted: Wanted) -> Fetched | None:
        world = self.world
        if wanted.peer not in self.peers:
            return Fetched(wanted.ticket, problem=KVLost(f"no peer {wanted.peer} is known here"))
        assert all(other.ticket != wanted.ticket for other in self.asked), f"{wanted.ticket} is on its way already"
        self.asked.append(wanted)
        longest = world.faults.longest_delay if world.happens(world.faults.delay) else 0.01
        world.after(world.rng.uniform(0.0, longest), lambda: self._read(wanted))
        return None

    def _read(self, wanted: Wanted) -> None:
        """The request is at the sender."""
        world, sender = self.world, self.world.slabs.get(wanted.handle.segment)
        if sender is None or not sender.keep(wanted.handle):
            self._answer(wanted, Fetched(wanted.ticket, problem=KVLost("it is not there any more")))
            return
        fetched = self.way.fetch(wanted)
        if fetched.problem is None:
            fetched = Fetched(fetched.ticket, [bytes(block) for block in fetched.blocks])

        def sent() -> None:
            sender.let_go(wanted.handle)
            if world.nodes[wanted.peer].alive:
                world.nodes[wanted.peer].wake(world.now)
            self._answer(wanted, fetched)

        world.after(world.rng.uniform(0.0, 0.01), sent)

    def _answer(self, wanted: Wanted, fetched: Fetched) -> None:
        if wanted in self.asked and self.lifecycle == self.node.lifecycle:
            self.asked.remove(wanted)
            self.come.append(fetched)
            self.node.wake(self.world.now)

    def fetched(self) -> Iterator[Fetched]:
        while self.come:
            yield self.come.pop(0)

    def close(self) -> None:
        """It ends with its process."""


def store(node: WorkerNode, paths: tuple[str, ...], slots: int, block_bytes: int) -> Store:
    """A worker's: it can read, and be read, over these paths."""
    world = node.world
    slab = LocalSlab(node.name, slots, block_bytes, world.segments)
    world.slabs[slab.segment.name] = slab
    home = LocalReader(world.segments)
    readers: dict[str, Any] = {"local": home, "stream": SlowReader(node)}
    reach = Reach(paths=list(paths), host="h", process=0, segment=slab.segment.name)
    return Store(slab, {path: readers[path] for path in paths}, reach, home)
