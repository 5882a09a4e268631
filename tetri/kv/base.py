"""The contract of the KV stores: the sender puts a chunk into its own slab, the receiver takes its own copy over one of
several paths, the sender frees. The unit is the KV block, opaque bytes; slots are one block each, so a slab cannot
fragment.

A slab is written once per chunk, before anybody knows who will read it: a chunk that one instance refuses is offered to
the next as it lies there. How it is read, mapped, through a device's IPC handle, or asked for over a socket, is the
matter of the reader that the pair has in common (policy/pairing.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tetri.request import Reach
from tetri.wire.handover import Handle

# A block's bytes where an engine can read or write them: a memoryview, or on a GPU a device array of uint8. One that
# was taken may also be a tuple of memoryviews that follow one another: the parts in which it came.
Block = Any
Write = Callable[[Sequence[Block]], None]


def parts(block: Block) -> tuple[Any, ...]:
    """What the block lies in, in order; nothing is copied."""
    return block if isinstance(block, tuple) else (block,)


def joined(block: Block) -> Block:
    """The block in one memoryview or device array: a copy if it lies in several parts, else the block itself."""
    return memoryview(b"".join(block)) if isinstance(block, tuple) else block


class KVError(RuntimeError):
    """A slab cannot be made or reached; one line that says what to do."""


class KVLost(KVError):
    """The blocks are no longer what the handle says (slot reused, segment gone), or cannot be reached."""


class KVCorrupt(KVError):
    """The copy is not what was announced: its digest is another one."""


class KVShort(KVCorrupt):
    """The copy is shorter than what was announced."""


class KVForeign(KVError):
    """The handle is of a slab that is not the peer's."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """One chunk to be taken: `ticket` is given back with it; `peer` is the sender's iid; `digest` is xxh3-64 over its
    blocks in order, None: not made."""

    ticket: tuple[str, int]  # the leg's key and the chunk's index
    peer: str
    path: str
    handle: Handle
    digest: int | None


@dataclass(frozen=True, slots=True)
class Fetched:
    """The receiver's own copy of what was wanted, digest checked over that copy and generations read again after it,
    one `Block` each, perhaps in parts; or the `problem`, and no blocks. Blocks are valid until the store is asked for
    anything else."""

    ticket: tuple[str, int]
    blocks: Sequence[Block] = ()
    problem: KVError | None = None


class Slab(Protocol):
    """The memory that one worker's chunks leave through. A slot has two owners: the request, which lets go by `free`,
    and whoever writes it or sends it on right now (`keep`, `let_go`); it is used again when both have let go."""

    slots: int

    @property
    def free_slots(self) -> int: ...

    def put(self, count: int, write: Write, owner: str = "") -> tuple[Handle, int | None]:
        """Take `count` slots, let `write` fill one block each, return the handle and the digest (None: made without).
        `owner` is who is shown as theirs. Raises KVError when there are too few free slots (the core counts them: a
        bug)."""

    def free(self, handle: Handle) -> None:
        """The request lets go: the generations count up. Freeing twice is an error (KVError)."""

    def freed(self) -> int:
        """How many slots came free since the last call. Every slot that is put comes free once."""

    def keep(self, handle: Handle) -> bool:
        """Be the second owner of these slots; False when they are no longer what the handle says. Any thread."""

    def let_go(self, handle: Handle) -> None:
        """Any thread."""

    def close(self) -> None:
        """Give the memory back. What peers have mapped stays readable for them. A second call does nothing."""


class Reader(Protocol):
    """One way to read the slabs of others. Belongs to the worker's thread; it may have threads of its own. Every
    `fetch` is answered by one Taken, whatever happens to the peer."""

    def meet(self, peer: str, reach: Reach) -> None:
        """This is how `peer` can be read from now on, perhaps another incarnation of it. Never waits, never raises."""

    def part(self, peer: str) -> None:
        """The peer is gone: close what is open of it; what is on its way is answered as lost. Unknown peers are
        fine."""

    def fetch(self, wanted: Wanted) -> Fetched | None:
        """None when it comes later, by `fetched`."""

    def fetched(self) -> Iterable[Fetched]:
        """What has come. Each Taken is used before the next is asked for."""

    def close(self) -> None: ...


class KVStore(Protocol):
    """What a worker sees: its own slab, and a reader for each path.

    `reach` is what others must know to read the slab, for Ready."""

    slots: int
    reach: Reach

    @property
    def free_slots(self) -> int: ...

    def put(self, count: int, write: Write, owner: str = "") -> tuple[Handle, int | None]: ...

    def free(self, handle: Handle) -> None: ...

    def freed(self) -> int: ...

    def meet(self, peer: str, reach: Reach) -> None: ...

    def part(self, peer: str) -> None: ...

    def fetch(self, wanted: Wanted) -> Fetched | None: ...

    def fetched(self) -> Iterable[Fetched]: ...

    def due(self) -> float | None:
        """When `fetched` must be asked although nothing wakes the worker, in seconds of time.monotonic(); None: never.
        0.0: there is something already."""

    def close(self) -> None: ...
