"""The KV store of a worker with faults: slabs with real bytes, whose transfers take virtual time and sometimes fail."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from msgspec.structs import replace

from tetri.core.actions import Adopt, Adopted
from tetri.executor import Copies
from tetri.instance import Reach
from tetri.kv.base import Fetched, KVLost, Wanted
from tetri.kv.limit import LimitedLink
from tetri.kv.local import LocalReader, LocalSlab, Peers
from tetri.kv.store import Store
from tetri.sim.faulty.chance import Chance
from tetri.sim.faulty.network import Process


class Memories:
    """All slabs of a deployment, including those of killed processes. Each block counts as `block_bytes` bytes."""

    def __init__(self, chance: Chance, block_bytes: int, latency_s: float) -> None:
        self.chance, self.block_bytes, self.latency_s = chance, block_bytes, latency_s
        self.segments: Peers = {}
        self.slabs: dict[str, LocalSlab] = {}


class SlowReader:
    """Reads the slabs of other workers with a delay. A fetch reaches the sender after the latency and its bytes arrive
    after the link's transfer time; meanwhile the sender keeps the slots. Every fetch is answered once. `owner` is the
    worker that fetches."""

    def __init__(self, memories: Memories, link: LimitedLink) -> None:
        self.memories, self.link = memories, link
        self.way = LocalReader(memories.segments)
        self.owner: Process | None = None
        self.peers: dict[str, str] = {}  # peer -> segment
        self.asked: list[Wanted] = []
        self.come: list[Fetched] = []
        self.moved_bytes = 0

    def meet(self, peer: str, reach: Reach) -> None:
        self.peers[peer] = reach.segment

    def part(self, peer: str) -> None:
        self.peers.pop(peer, None)
        for wanted in [wanted for wanted in self.asked if wanted.peer == peer]:
            self._answer(wanted, Fetched(wanted.ticket, problem=KVLost(f"{peer} is gone")))

    def fetch(self, wanted: Wanted) -> Fetched | None:
        chance = self.memories.chance
        if wanted.peer not in self.peers:
            return Fetched(wanted.ticket, problem=KVLost(f"no peer {wanted.peer} is known here"))
        assert all(other.ticket != wanted.ticket for other in self.asked), f"{wanted.ticket} is already being fetched"
        self.asked.append(wanted)
        kernel = chance.kernel
        kernel.at(kernel.now + chance.way_s(self.memories.latency_s), self._read, wanted)
        return None

    def _read(self, wanted: Wanted) -> None:
        """The fetch has reached the sender: read the slab."""
        memories, kernel = self.memories, self.memories.chance.kernel
        sender = memories.slabs.get(wanted.handle.segment)
        if sender is None or not sender.keep(wanted.handle):
            self._answer(wanted, Fetched(wanted.ticket, problem=KVLost("the KV is no longer there")))
            return
        fetched = self.way.copied(wanted)
        if fetched.problem is None:
            fetched = Fetched(fetched.ticket, [bytes(block) for block in fetched.blocks])
        size = len(wanted.handle.slots) * memories.block_bytes
        self.moved_bytes += size
        arrives = self.link.arrival(size, kernel.now) + memories.chance.rng.uniform(0.0, 2 * memories.latency_s)
        kernel.at(arrives, self._sent, (wanted, sender, fetched))

    def _sent(self, transfer: tuple[Wanted, LocalSlab, Fetched]) -> None:
        wanted, sender, fetched = transfer
        sender.let_go(wanted.handle)
        assert self.owner is not None
        self.owner.port.wiring.processes[wanted.peer].wake()  # slots of the sender may be free now
        self._answer(wanted, fetched)

    def _answer(self, wanted: Wanted, fetched: Fetched) -> None:
        assert self.owner is not None
        if wanted in self.asked and self.owner.alive:
            self.asked.remove(wanted)
            self.come.append(fetched)
            self.owner.wake()

    def fetched(self) -> Iterator[Fetched]:
        while self.come:
            yield self.come.pop(0)

    def close(self) -> None:
        """Do nothing: the reader ends with its process."""


def store(
    memories: Memories, iid: str, paths: tuple[str, ...], slots: int, slot_bytes: int, link: LimitedLink
) -> tuple[Store, SlowReader]:
    """Return the store of a worker and its reader for all paths except `local`, which takes no time."""
    slab = LocalSlab(iid, slots, slot_bytes, memories.segments)
    memories.slabs[slab.segment.name] = slab
    home, slow = LocalReader(memories.segments), SlowReader(memories, link)
    reach = Reach(paths=list(paths), host="", process=0, segment=slab.segment.name)
    return Store(slab, {path: home if path == "local" else slow for path in paths}, reach, home), slow


class FaultyCopies(Copies):
    """Copies KV into the engine; by chance the bytes are corrupt, truncated or lost."""

    def __init__(self, chance: Chance, engine: Any, own: Store, slow: SlowReader) -> None:
        super().__init__(engine, own, lambda error, key, chunk: chance.note(key, f"chunk {chunk}: {error}"))
        self.chance, self.slow = chance, slow

    @property
    def moved_bytes(self) -> int:
        return self.slow.moved_bytes

    def adopt(self, action: Adopt) -> Adopted | None:
        assert self.slow.owner is not None
        if self.chance.cuts and (cut := self.chance.cut(self.slow.owner.name, action.peer)) is not None:
            return Adopted(action.key, action.index, "flipped" if cut.flips else "lost")
        if self.chance.happens("corrupt"):
            action = replace(action, digest=(action.digest or 0) ^ 1)
        elif self.chance.happens("lose"):
            handle = action.handle
            action = replace(action, handle=replace(handle, generations=[0] * len(handle.slots)))
        return super().adopt(action)

    def _adopted(self, fetched: Fetched) -> Adopted:
        if fetched.problem is None and self.chance.happens("truncate"):
            fetched = Fetched(fetched.ticket, fetched.blocks[:-1])
        return super()._adopted(fetched)
