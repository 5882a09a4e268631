"""The path `nixl`: one-sided reads of a peer's slab, over RDMA where the hosts have it, else over shared memory or TCP.
The peer's worker takes no part in a read.

Each worker's agent registers its slab. The worker's `Reach` has what a peer needs to read it: the agent's metadata and
two addresses. nixl does not authenticate readers, and over TCP does not restrict what they read: a client that can
connect to an agent can read the memory of its process. Use it only in a network of workers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from xxhash import xxh3_64

from tetri.instance import Reach
from tetri.kv.base import Fetched, KVCorrupt, KVError, KVForeign, KVLost, Wanted
from tetri.kv.nixl.agent import Agent, Region, address, installed
from tetri.kv.nixl.mover import Mover, Source
from tetri.kv.slab import HostSlab, Segment, shape_problem
from tetri.request import Record
from tetri.wire.codec import WireError, decode, encode

__all__ = ["NixlReader", "installed", "open_nixl"]
PATH = "nixl"
_NOTHING = memoryview(b"")
_END = 1 << 63


class Ticket(Record, frozen=True):
    """What a peer needs to read a slab: the agent's metadata, and the addresses of generations and blocks."""

    metadata: bytes
    generations: int
    blocks: int
    slots: int
    block_bytes: int

    def __post_init__(self) -> None:
        if min(self.generations, self.blocks, self.slots, self.block_bytes) < 0:
            raise ValueError("a negative address or size")
        if max(self.generations + 8 * self.slots, self.blocks + self.slots * self.block_bytes) >= _END:
            raise ValueError("beyond the end of memory")


def open_nixl(
    slab: HostSlab, staging: int, wake: Callable[[], None] = lambda: None, everywhere: bool = True
) -> tuple[NixlReader, bytes]:
    """A reader, and the encoded Ticket of `slab`. `staging`: expected bytes of a KV chunk. Without `everywhere` only
    processes of this host can connect. Raises KVError."""
    segment = slab.segment
    agent = Agent(segment.name, everywhere)
    for view in (segment.generations.cast("B"), segment.blocks):
        agent.register(view)
    ticket = Ticket(
        metadata=agent.metadata(),
        generations=address(segment.generations.cast("B")),
        blocks=address(segment.blocks),
        slots=segment.slots,
        block_bytes=segment.block_bytes,
    )
    return NixlReader(agent, staging, wake), encode(ticket)


class NixlReader:
    """Reader of the path `nixl`. No method blocks except `close`: a Mover does the reads in a thread of its own."""

    def __init__(self, agent: Agent, staging: int, wake: Callable[[], None]) -> None:
        self._agent, self._wake = agent, wake
        self._peers: dict[str, tuple[Segment, Source] | KVLost] = {}
        self._answers: deque[tuple[Fetched, Region | None]] = deque()
        self._mover = Mover(agent, staging, self._answered)
        self._mover.start()
        self._closed = False

    def _answered(self, fetched: Fetched, area: Region | None) -> None:
        self._answers.append((fetched, area))
        self._wake()

    def meet(self, peer: str, reach: Reach) -> None:
        known = self._peers.get(peer)
        if isinstance(known, tuple) and known[1].name == reach.segment:
            return
        self.part(peer)
        try:
            ticket = decode(reach.tickets.get(PATH, b""), Ticket)
        except WireError as error:
            self._peers[peer] = KVLost(f"{peer} has sent an invalid ticket for nixl: {error}")
            return
        assert isinstance(ticket, Ticket)
        shape = Segment(reach.segment, ticket.slots, ticket.block_bytes, _NOTHING, _NOTHING)
        self._peers[peer] = shape, Source(reach.segment, ticket.metadata, ticket.generations, ticket.blocks)

    def part(self, peer: str) -> None:
        known = self._peers.pop(peer, None)
        if isinstance(known, tuple):
            self._mover.part(known[1].name)

    def fetch(self, wanted: Wanted) -> Fetched | None:
        source = self._source(wanted)
        if isinstance(source, KVError):
            return Fetched(wanted.ticket, problem=source)
        if not wanted.handle.slots:
            right = wanted.digest in (None, xxh3_64().intdigest())
            wrong = KVCorrupt(f"no blocks, but a digest of {wanted.digest}")
            return Fetched(wanted.ticket, problem=None if right else wrong)
        self._mover.fetch(wanted, source)
        return None

    def _source(self, wanted: Wanted) -> Source | KVError:
        """The slab to read, or why it cannot be read."""
        known = self._peers.get(wanted.peer, KVLost(f"no peer {wanted.peer} is known here"))
        if isinstance(known, KVLost):
            return known
        shape, source = known
        why = shape_problem(shape, wanted.handle)
        return source if why is None else KVForeign(f"{shape.name}: {why}")

    def fetched(self) -> Iterable[Fetched]:
        while self._answers:
            fetched, area = self._answers.popleft()
            try:
                yield fetched
            finally:
                if area is not None:
                    self._mover.recycle(area)

    def close(self) -> None:
        """End all threads. Fetches in flight get no answer. A second call does nothing."""
        if not self._closed:
            self._closed = True
            self._mover.stop()
            self._agent.close()
