"""What the contract of the KV paths runs on: stores that reach each other, driven as a worker's loop drives its own."""

import fcntl
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tetri.kv.base import Fetched, KVError, KVStore, Wanted, joined
from tetri.wire.handover import Handle

PATIENCE_S = 20.0  # for anything that should take milliseconds
SLOTS, BLOCK = 8, 100  # blocks in a slab, bytes in a block


@dataclass(frozen=True)
class Chunk:
    """What a party has put: `blocks` are the bytes."""

    sender: str
    handle: Handle
    digest: int | None
    blocks: tuple[bytes, ...]


class World:
    """Stores that reach each other over `path`. A transport's tests derive one: `store` makes a store that has the
    path, in this process; `fill` and `read` are how a block gets and gives its bytes."""

    path = ""

    def __init__(self, folder: object = "") -> None:
        self.folder, self.news = str(folder), threading.Event()
        self.parties: list[Party] = []

    def store(self, iid: str, wake: Callable[[], None], slots: int, block_bytes: int, digest: bool) -> KVStore:
        raise NotImplementedError

    def fill(self, block: object, data: bytes) -> None:
        block[:] = data  # type: ignore[index]

    def read(self, block: object) -> bytes:
        return bytes(joined(block))

    def open(self, iid: str, slots: int = SLOTS, block_bytes: int = BLOCK, digest: bool = True) -> "Party":
        party = Party(self, iid, self.store(iid, self.news.set, slots, block_bytes, digest))
        self.parties.append(party)
        return party

    def pair(self, **options: Any) -> tuple["Party", "Party"]:
        """(sender, receiver), the receiver knows the sender."""
        sender, receiver = self.open("p0", **options), self.open("d0", **options)
        receiver.meet(sender)
        return sender, receiver

    def expect_the_worst(self) -> None:
        """Stores opened from now on need not wait long for a peer that is silent."""

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Run all parties' loops until it holds."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            self.news.clear()
            for party in self.parties:
                party.hear()
            if condition():
                return
            assert time.monotonic() < deadline, f"{what}: not after {PATIENCE_S} s"
            self.news.wait(0.01)  # whose `due` is now is heard soon enough

    def settle(self) -> None:
        """Until every take has been answered."""
        self.wait(lambda: not any(party.waiting for party in self.parties), "takes without an answer")

    def close(self) -> None:
        """End all stores, and hold them to what each owes: one answer a take, each slot free once."""
        try:
            self.settle()
            for party in self.parties:
                party.give_back()
            owed = {p.iid: p for p in self.parties if not p.closed}.values()
            self.wait(lambda: all(p.came_free == p.were_put for p in owed), "slots that do not come free")
            assert [p.store.free_slots for p in owed] == [p.store.slots for p in owed]
        finally:
            for party in self.parties:
                party.close()


class Party:
    """One worker: a store, and what it was promised. `answers` has the bytes or the problem of each take."""

    def __init__(self, world: World, iid: str, store: KVStore) -> None:
        self.world, self.iid, self.store = world, iid, store
        self.live: list[Chunk] = []
        self.were_put = self.came_free = self.asked = 0
        self.waiting: set[tuple[str, int]] = set()
        self.answers: dict[tuple[str, int], list[bytes] | KVError] = {}
        self.closed = False
        self.before_reading: Callable[[], None] = lambda: None

    def put(self, *blocks: bytes) -> Chunk:
        def write(views: object) -> None:
            for view, data in zip(views, blocks, strict=True):  # type: ignore[call-overload]
                self.world.fill(view, data)

        chunk = Chunk(self.iid, *self.store.put(len(blocks), write, f"p:{self.were_put}"), blocks)
        self.live.append(chunk)
        self.were_put += len(blocks)
        return chunk

    def free(self, chunk: Chunk) -> None:
        self.live.remove(chunk)
        self.store.free(chunk.handle)

    def meet(self, other: "Party") -> None:
        self.store.meet(other.iid, other.store.reach)

    def ask(self, chunk: Chunk, **changed: object) -> tuple[str, int]:
        """Begin a take; its ticket. `changed`: other fields of Wanted."""
        self.asked += 1
        ticket = (f"d:{chunk.sender}", self.asked)
        fields = {"peer": chunk.sender, "handle": chunk.handle, "digest": chunk.digest, **changed}
        self.waiting.add(ticket)
        fetched = self.store.fetch(Wanted(ticket=ticket, path=self.world.path, **fields))  # type: ignore[arg-type]
        if fetched is not None:
            self._answered(fetched)
        return ticket

    def fetch(self, chunk: Chunk, **changed: object) -> list[bytes]:
        """A whole take: the bytes. Raises its problem."""
        ticket = self.ask(chunk, **changed)
        self.world.wait(lambda: ticket not in self.waiting, "a take without an answer")
        return self.got(ticket)

    def got(self, ticket: tuple[str, int]) -> list[bytes]:
        answer = self.answers[ticket]
        if isinstance(answer, KVError):
            raise answer
        return answer

    def hear(self) -> None:
        if self.closed:
            return
        for fetched in self.store.fetched():
            self._answered(fetched)
        self.came_free += self.store.freed()

    def _answered(self, fetched: Fetched) -> None:
        assert fetched.ticket in self.waiting, f"a second answer, or one that nobody asked for: {fetched.ticket}"
        self.waiting.remove(fetched.ticket)
        self.before_reading()
        assert fetched.problem is None or not fetched.blocks
        self.answers[fetched.ticket] = fetched.problem or [self.world.read(block) for block in fetched.blocks]

    def give_back(self) -> None:
        while self.live and not self.closed:
            self.free(self.live[-1])

    def close(self) -> None:
        """As a worker ends: what it waits for will not come."""
        if not self.closed:
            self.store.close()
            self.closed = True
            self.waiting.clear()

    def kill(self) -> None:
        end(self.store.reach.segment)
        self.closed = True


def end(segment: str) -> None:
    """The segment's owner is gone, as others see it: the kernel drops a dead process's lock, and closes nothing."""
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            if os.readlink(link).endswith(segment):
                fcntl.flock(int(link.name), fcntl.LOCK_UN)


def block(number: int, size: int = BLOCK) -> bytes:
    """Other bytes for every number, and within a block other bytes at every place."""
    return (np.arange(-(-size // 8), dtype="<u8") + number * 1_000_003).tobytes()[:size]
