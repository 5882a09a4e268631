"""The contract of the KV stores.

The sender puts a KV chunk into its own slab, the receiver fetches a copy over one of several paths, and the sender
frees the slots. The unit is the KV block, opaque bytes. A slot holds one block, so a slab cannot fragment.

The sender writes a chunk once, before the decode instance is known: when one instance refuses the offer, the next is
offered the same slots. The path (shared memory, CUDA IPC, a socket) is chosen for each pair of instances
(policy/pairing.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tetri.instance import Reach
from tetri.wire.handover import Handle

# A block's bytes, readable and writable by the engine: a memoryview, or on a GPU a device array of uint8. A fetched
# block may also be a tuple of memoryviews: the parts in which it arrived, in order.
Block = Any
Write = Callable[[Sequence[Block]], None]


def parts(block: Block) -> tuple[Any, ...]:
    """The memoryviews or device arrays that make up the block, in order. Nothing is copied."""
    return block if isinstance(block, tuple) else (block,)


def joined(block: Block) -> Block:
    """The block as one memoryview or device array: a copy if it has several parts, else the block itself."""
    return memoryview(b"".join(block)) if isinstance(block, tuple) else block


class KVError(RuntimeError):
    """A slab cannot be created or used. The message is one line and says what to do."""


class KVLost(KVError):
    """The slots no longer hold the chunk (slot reused, segment gone), or the peer cannot be reached."""


class KVCorrupt(KVError):
    """The digest of the copy differs from the announced digest."""


class KVShort(KVCorrupt):
    """The copy is shorter than announced."""


class KVForeign(KVError):
    """The handle does not belong to the peer's slab."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """One KV chunk to fetch. `ticket` comes back in `Fetched`; `peer` is the sender's iid; `digest` is the xxh3-64 of
    the blocks in order, None if the sender computed none."""

    ticket: tuple[str, int]  # key of the engine request, index of the chunk
    peer: str
    path: str
    handle: Handle
    digest: int | None


@dataclass(frozen=True, slots=True)
class Fetched:
    """The result of a fetch: the receiver's copy, one `Block` for each slot, or a `problem` and no blocks. The digest
    was checked over the copy, and the generations again after it. Blocks stay valid until the next call of the
    store."""

    ticket: tuple[str, int]
    blocks: Sequence[Block] = ()
    problem: KVError | None = None


class SenderSide(Protocol):
    """Where the KV chunks of one worker are put to be sent."""

    slots: int

    @property
    def free_slots(self) -> int:
        """How many slots `put` can use now."""

    def put(self, count: int, write: Write, owner: str = "") -> tuple[Handle, int | None]:
        """Allocate `count` slots, let `write` fill one block each, return the handle and the digest (None: digests
        are off). `owner` labels the slots in `doctor`. Raises KVError when too few slots are free; that is a bug,
        because the core counts them."""

    def free(self, handle: Handle) -> None:
        """The request releases its slots; their generations count up. Raises KVError when freed twice."""

    def freed(self) -> int:
        """How many slots became free since the last call. Each slot that was put counts once."""

    def counters(self) -> dict[str, int]:
        """What has happened to the memory since its start, by name, for heartbeats. Empty as long as nothing has."""

    def close(self) -> None:
        """Free the memory. Peers' mappings stay readable. A second call does nothing."""


class Slab(SenderSide, Protocol):
    """The memory from which one worker's KV chunks are sent.

    A slot has up to two owners: the request, until `free`; and a transfer that is reading it, from `keep` to
    `let_go`. The slot is reused after both have released it."""

    def keep(self, handle: Handle) -> bool:
        """Protect these slots from reuse. False when they no longer hold the chunk. Callable from any thread."""

    def let_go(self, handle: Handle) -> int:
        """End one `keep`. Returns how many slots that made free. Callable from any thread."""


class Reader(Protocol):
    """Reads the slabs of peers over one path. Called from the worker's thread; may run threads of its own. Every
    `fetch` produces exactly one `Fetched`, also when the peer dies."""

    def meet(self, peer: str, reach: Reach) -> None:
        """Register how to read `peer`, which may be a new incarnation. Never blocks, never raises."""

    def part(self, peer: str) -> None:
        """Forget the peer: release its resources and answer fetches in flight with KVLost. An unknown peer is no
        error."""

    def fetch(self, wanted: Wanted) -> Fetched | None:
        """Fetch a KV chunk. None: the result comes later, from `fetched`."""

    def fetched(self) -> Iterable[Fetched]:
        """Results of earlier fetches. Use each one before taking the next: its memory is reused."""

    def close(self) -> None:
        """Release all resources. A second call does nothing."""


class KVStore(SenderSide, Reader, Protocol):
    """What a worker uses: its own slab (`Slab`), and one reader for each path (`Reader`).

    `reach` tells peers how to read the slab; the worker sends it in Ready."""

    reach: Reach

    def counters(self) -> dict[str, int]:
        """As in `SenderSide`, and the events on its KV paths: <path>_<what> -> how many."""

    def due(self) -> float | None:
        """Latest time at which `fetched` must be called, in seconds of time.monotonic(), if `wake` is not called
        before. None: no such time. 0.0: results are waiting."""
