"""The thread that reads from peers by nixl. It makes all calls of the agent, so that the worker never blocks.

A KV chunk takes three reads in sequence: generations, blocks, generations again. nixl does not signal the end of a
read, so the thread polls, with pauses that grow to one millisecond. It sleeps when no read is in flight.

A read that hangs cannot be cancelled: UCX was seen to write long after the request was released, and even after the
peer's agent was removed. So the thread answers the fetch with KVLost, and keeps the read's memory and the peer's agent
until the read has ended.
"""

from __future__ import annotations

import struct
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

from tetri.kv.base import Fetched, KVError, KVLost, Wanted
from tetri.kv.nixl.agent import Agent, PeerUnreachable, Region, Span
from tetri.kv.slab import digest_of
from tetri.kv.staging import check_digest, compare_generations

TIMEOUT_S = 10.0  # for the reads of one chunk, and before that for memory to read into
MOST_AREAS = 8  # receive buffers: chunks in flight or not yet adopted
_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _IDLE_PAUSE_S = 20e-6, 1e-3, 20e-3
_GENERATION = 8  # bytes of a generation

Answer = Callable[[Fetched, Region | None], None]
Reads = Iterator[tuple[list[Span], list[Span]]]


@dataclass(frozen=True, slots=True)
class Source:
    """A peer's slab. `name` is also the name of its agent; `generations` and `blocks` are addresses in the peer."""

    name: str
    metadata: bytes
    generations: int
    blocks: int


@dataclass(slots=True)
class PeerState:
    """State of a peer's agent. `met`: added to this agent; `stale`: to be removed when no read uses it; `reading`:
    moves that use it."""

    met: bool = False
    stale: bool = False
    reading: int = 0


@dataclass(slots=True, eq=False)
class Move:
    """One KV chunk in flight. `read` is the handle of the read in flight, None between reads; `deadline` is in seconds
    of time.monotonic()."""

    wanted: Wanted
    source: Source
    deadline: float
    area: Region | None = None
    reads: Reads = field(default=iter(()))
    read: int | None = None


class Mover(threading.Thread):
    """The thread `kv-nixl`. It calls `answer` once for each `fetch`, from this thread, with the result and the memory
    that the caller must return with `recycle` (None: no memory)."""

    def __init__(self, agent: Agent, staging: int, answer: Answer) -> None:
        super().__init__(name="kv-nixl", daemon=True)
        self._agent, self._answer = agent, answer
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._areas = [agent.allocate(staging)]
        self._made = 1
        self._peers: dict[str, PeerState] = {}
        self._waiting: deque[Move] = deque()
        self._moving: list[Move] = []
        self._lost: list[Move] = []  # answered with KVLost while their reads hang
        self._running = True

    # ------------------------------------------------------------ callable from any thread

    def fetch(self, wanted: Wanted, source: Source) -> None:
        move = Move(wanted, source, time.monotonic() + TIMEOUT_S)
        self._inbox.put(lambda: self._waiting.append(move))

    def part(self, name: str) -> None:
        """Answer the fetches in flight from this slab with KVLost, and remove its agent."""
        self._inbox.put(lambda: self._part(name))

    def recycle(self, area: Region) -> None:
        """Return memory that `answer` passed on."""
        self._inbox.put(lambda: self._areas.append(area))

    def stop(self) -> None:
        """End the thread. Fetches in flight get no answer."""
        self._inbox.put(self._stop)
        self.join()
        for move in (*self._moving, *self._lost):
            self._release(move)

    # ------------------------------------------------------------ the thread

    def run(self) -> None:
        """Serve until `stop`. After an unexpected exception answer every fetch with KVLost, so that none hangs."""
        try:
            self._serve()
        except Exception as mistake:
            traceback.print_exc()
            why = KVLost(f"the thread that reads by nixl has failed: {mistake!r}")
            while self._running:
                moves, self._moving = [*self._waiting, *self._moving], []
                self._waiting.clear()
                for move in moves:
                    self._answer(Fetched(move.wanted.ticket, problem=why), None)
                self._receive(None)

    def _serve(self) -> None:
        pause = _FIRST_PAUSE_S
        while self._running:
            busy = self._moving or self._waiting or self._lost
            received = self._receive(pause if busy else None)
            moved = self._advance(time.monotonic())
            longest = _LONGEST_PAUSE_S if self._moving else _IDLE_PAUSE_S
            pause = _FIRST_PAUSE_S if received or moved else min(2 * pause, longest)

    def _receive(self, timeout: float | None) -> bool:
        received = False
        try:
            self._inbox.get(timeout=timeout)()
            received = True
            while True:
                self._inbox.get_nowait()()
        except Empty:
            return received

    def _stop(self) -> None:
        self._running = False

    def _part(self, name: str) -> None:
        gone = KVLost(f"the peer of {name} has gone")
        for move in [move for move in (*self._waiting, *self._moving) if move.source.name == name]:
            self._fail(move, gone)
        peer = self._peers.get(name)
        if peer is not None:
            peer.stale = True
            self._tidy(name, peer)

    def _advance(self, now: float) -> bool:
        """Start waiting moves, continue those whose read has ended, and fail the overdue; whether any moved on."""
        begun = [move for move in tuple(self._waiting) if self._begin(move, now)]
        ended = [move for move in tuple(self._moving) if self._go_on(move)]
        for move in (*self._waiting, *self._moving):
            if now > move.deadline:
                what = "its turn" if move.read is None else "the bytes"
                self._fail(move, KVLost(f"{move.source.name}: waited {TIMEOUT_S:g} s for {what}"))
        for move in [move for move in self._lost if self._over(move)]:
            self._lost.remove(move)
            self._give_back(move)
        return bool(begun or ended)

    # ------------------------------------------------------------ a move

    def _begin(self, move: Move, now: float) -> bool:
        peer = self._peers.setdefault(move.source.name, PeerState())
        if peer.stale:
            return False  # waits until the stale agent's reads have ended, or until this move's deadline
        area = self._area(len(move.wanted.handle.slots) * (move.wanted.handle.block_bytes + _GENERATION))
        if area is None:
            return False
        self._waiting.remove(move)
        self._moving.append(move)
        peer.reading += 1
        move.area, move.deadline, move.reads = area, now + TIMEOUT_S, self._reads(move, area)
        try:
            if not peer.met:
                self._agent.meet(move.source.name, move.source.metadata)
                peer.met = True
        except PeerUnreachable as problem:
            peer.stale = True
            self._fail(move, problem)
        return True

    def _go_on(self, move: Move) -> bool:
        """Run the move's reads as far as possible without waiting; whether a read has ended."""
        moved = False
        try:
            while move.read is None or self._agent.ended(move.read):
                moved = True
                self._release(move)
                into, what = next(move.reads)
                move.read = self._agent.read(move.source.name, into, what)
        except StopIteration:
            self._arrived(move)
        except KVError as problem:
            self._peers[move.source.name].stale |= isinstance(problem, PeerUnreachable)
            self._release(move)
            self._fail(move, problem)
            return True
        return moved

    def _reads(self, move: Move, area: Region) -> Reads:
        """The move's reads in order, each as (local spans, remote spans), with the checks between them. Raises KVLost
        or KVCorrupt."""
        handle, source = move.wanted.handle, move.source
        count, size = len(handle.slots), handle.block_bytes
        generations_at = area.address + count * size
        generations = (
            [(generations_at + _GENERATION * at, _GENERATION) for at in range(count)],
            [(source.generations + _GENERATION * slot, _GENERATION) for slot in handle.slots],
        )
        yield generations
        self._check(move, area)
        yield (
            [(area.address + at * size, size) for at in range(count)],
            [(source.blocks + slot * size, size) for slot in handle.slots],
        )
        yield generations
        self._check(move, area)
        if move.wanted.digest is not None:
            check_digest(source.name, digest_of([area.view[: count * size]]), move.wanted.digest)

    @staticmethod
    def _check(move: Move, area: Region) -> None:
        handle = move.wanted.handle
        count = len(handle.slots)
        present = struct.unpack_from(f"={count}Q", area.view, count * handle.block_bytes)
        compare_generations(move.source.name, handle, present)

    def _release(self, move: Move) -> None:
        if move.read is not None:
            read, move.read = move.read, None
            self._agent.release(read)

    def _arrived(self, move: Move) -> None:
        self._moving.remove(move)
        area, move.area = move.area, None
        assert area is not None
        size = move.wanted.handle.block_bytes
        blocks = [area.view[at * size : (at + 1) * size] for at in range(len(move.wanted.handle.slots))]
        self._give_back(move)
        self._answer(Fetched(move.wanted.ticket, blocks), area)

    def _fail(self, move: Move, problem: KVError) -> None:
        """Answer with `problem`. Keep the memory if a read that has not ended may still write to it."""
        if move in self._waiting:
            self._waiting.remove(move)
        else:
            self._moving.remove(move)
            if move.read is None:
                self._give_back(move)
            else:
                self._peers[move.source.name].stale = True
                self._lost.append(move)
        self._answer(Fetched(move.wanted.ticket, problem=problem), None)

    def _over(self, move: Move) -> bool:
        """Whether a hanging read has ended at last; releases it."""
        with suppress(PeerUnreachable):  # the connection has ended, so nothing writes any more
            if move.read is not None and not self._agent.ended(move.read):
                return False
        self._release(move)
        return True

    # ------------------------------------------------------------ memory and peers

    def _area(self, size: int) -> Region | None:
        """A receive buffer of at least `size` bytes; None when all are in use."""
        fits = [area for area in self._areas if len(area.view) >= size]
        if fits:
            self._areas.remove(fits[0])
            return fits[0]
        if self._made < MOST_AREAS:
            self._made += 1
        elif self._areas:
            self._agent.unregister(self._areas.pop())
        else:
            return None
        return self._agent.allocate(size)

    def _give_back(self, move: Move) -> None:
        """End the move's use of its peer, and return its memory unless `answer` passed that on."""
        if move.area is not None:
            self._areas.append(move.area)
            move.area = None
        peer = self._peers[move.source.name]
        peer.reading -= 1
        self._tidy(move.source.name, peer)

    def _tidy(self, name: str, peer: PeerState) -> None:
        if peer.stale and not peer.reading:
            self._agent.part(name)
            del self._peers[name]
