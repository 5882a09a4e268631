"""Wraps a KV store and injects faults. It changes bytes, never handles or digests, so that the store's own checks have
to find the fault."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from tetri.faults import Chance
from tetri.kv.base import Block, Fetched, KVLost, KVStore, Wanted, Write, joined, parts
from tetri.kv.delayed import DelayedStore
from tetri.kv.local import LocalReader, LocalSlab, Peers
from tetri.wire.handover import Handle


def kill_myself(moment: str) -> None:
    """Kill this process without clean-up, as the kernel's out-of-memory killer does."""
    os.kill(os.getpid(), signal.SIGKILL)


class FaultyStore(DelayedStore):
    """`store` with the faults that `chance` draws. `die` is called with the moment (text) at which a "die" fault
    strikes. `clock`: seconds."""

    def __init__(
        self,
        store: KVStore,
        chance: Chance,
        die: Callable[[str], None] = kill_myself,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(store, clock)
        self.chance = chance
        self._die = die
        self._relay = Relay(chance)
        self._harmed: dict[tuple[str, int], tuple[str, Wanted]] = {}  # fetches in flight that get a fault, and which

    def _dies(self, moment: str) -> None:
        if self.chance.happens("die"):
            self._die(moment)

    # ------------------------------------------------------------ the sender's side

    def put(self, count: int, write: Write, owner: str = "") -> tuple[Handle, int | None]:
        written: list[Block] = []

        def observed(into: Sequence[Block]) -> None:
            write(into)
            written.extend(into)
            self._dies("between the copy into its slab and the digest")

        handle, digest = self.store.put(count, observed, owner)
        if written and self.chance.happens("spoil"):
            flip(self.chance, written)
        self._dies("between a put and its announcement")
        return handle, digest

    # ------------------------------------------------------------ the receiver's side

    def fetch(self, wanted: Wanted) -> Fetched | None:
        if self.chance.happens("lose"):
            return Fetched(wanted.ticket, problem=KVLost("lost on its way: an injected fault"))
        if self.chance.happens("late"):
            self.late.append((self.clock() + self.chance.seconds(), wanted))
            return None
        return self.start(wanted)

    def start(self, wanted: Wanted) -> Fetched | None:
        """Start a fetch, perhaps with a fault that its result will get."""
        kind = next((kind for kind in ("truncate", "flip") if self.chance.happens(kind)), None)
        if kind is not None:
            self._harmed[wanted.ticket] = (kind, wanted)
        fetched = self.store.fetch(wanted)
        return None if fetched is None else self._arrived(fetched)

    def _arrived(self, fetched: Fetched) -> Fetched:
        kind, wanted = self._harmed.pop(fetched.ticket, ("", None))
        if fetched.problem is None and kind == "truncate":
            fetched = replace(fetched, blocks=fetched.blocks[: self.chance.rng.randrange(len(fetched.blocks))])
        elif fetched.problem is None and wanted is not None:
            fetched = self._relay.pass_on(wanted, fetched.blocks)
        self._dies("between taking a chunk and its Landed")
        return fetched

    def stored(self) -> Iterator[Fetched]:
        """The results that the store has, with their faults."""
        return map(self._arrived, self.store.fetched())


class Relay:
    """One more hop for a KV chunk, through a slab whose memory corrupts it. The chunk is then fetched, and checked, as
    from any slab."""

    def __init__(self, chance: Chance) -> None:
        self.chance = chance
        self._segments: Peers = {}
        self._reader = LocalReader(self._segments)

    def pass_on(self, wanted: Wanted, blocks: Sequence[Block]) -> Fetched:
        """The result of sending these blocks through the corrupt slab. Blocks in device memory pass unchanged."""
        if not all(isinstance(part, memoryview) for block in blocks for part in parts(block)):
            return Fetched(wanted.ticket, blocks)
        slab = LocalSlab("relay", len(blocks), wanted.handle.block_bytes, self._segments, digest=False)

        def write(into: Sequence[Block]) -> None:
            for place, block in zip(into, blocks, strict=True):
                place[:] = joined(block)
            flip(self.chance, into)

        handle, _ = slab.put(len(blocks), write)
        try:
            return self._reader.copied(replace(wanted, handle=handle))
        finally:
            slab.close()


def flip(chance: Chance, blocks: Sequence[Block]) -> None:
    """Flip one bit in one of the blocks."""
    block = chance.rng.choice(blocks)
    block[chance.rng.randrange(len(block))] ^= 1 << chance.rng.randrange(8)
