"""Measure how fast KV chunks move from one process to another over a KV path, compared with a plain copy.

Sender and receiver are two processes on two cores. The measured steps are those of a worker: put (copy into the slab
and digest), announce, fetch (copy out and digest), landed. Several chunks are in transit at once. For `stream`, which
is compared with bare sockets, the chunks are in the slab before the clock starts and are fetched repeatedly: announce,
fetch, digest, landed; the time with put is measured as well.

All variants are measured in turns in the same rounds, so that other load on the machine affects all of them. Results
are medians over the rounds."""

from __future__ import annotations

import itertools
import mmap
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from tetri.bench.transfer.receiver import receive, undisturbed
from tetri.instance import Reach
from tetri.kv import StoreSettings, open_store
from tetri.kv.base import Block, KVError, KVStore
from tetri.net import keys
from tetri.wire.codec import decode, encode
from tetri.wire.handover import Chunk, Handle
from tetri.wire.messages import InboxMessage

PATIENCE_S = 60.0  # timeout for one chunk
POLL_S = 0.05  # a path may not wake the process when slots become free
SPARE = 2  # chunks in the slab besides those in transit
READY = ("stream",)  # paths measured with chunks that are in the slab already, and also with put


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement: chunks of `blocks` blocks of `block_bytes` over `transport`, `depth` in transit at once.
    Sources, targets and the slab rotate through `memory` bytes each, more than the CPU caches hold."""

    transport: str
    blocks: int
    block_bytes: int
    memory: int
    depth: int = 4

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk."""
        return self.blocks * self.block_bytes

    @property
    def places(self) -> int:
        """The number of chunks that fit into the memory."""
        return max(self.memory // self.chunk_bytes, self.depth + SPARE)


class Run(Protocol):
    """Moves `count` chunks and returns the seconds that it took."""

    def __call__(self, count: int) -> float: ...


Lane = Callable[[Case], Any]  # a context manager that yields a Run


@contextmanager
def pinned() -> Iterator[int]:
    """Pin this process to one core and yield the core for the other process (the same one if there is only one)."""
    before = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, before[:1])
    try:
        yield before[1 % len(before)]
    finally:
        os.sched_setaffinity(0, before)


class Memory:
    """Private memory for `places` chunks, with all pages mapped. `next` rotates through the chunks."""

    def __init__(self, case: Case) -> None:
        self._size = case.chunk_bytes
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
        self._all = memoryview(mmap.mmap(-1, case.places * self._size, flags=flags))
        for start in range(0, len(self._all), mmap.PAGESIZE):
            self._all[start] = start >> 12 & 255  # unwritten pages may all be the same zero page
        self._places = itertools.cycle(range(case.places))

    def next(self) -> memoryview:
        """Return the memory of the next chunk."""
        start = next(self._places) * self._size
        return self._all[start : start + self._size]


@contextmanager
def memcpy(case: Case) -> Iterator[Run]:
    """Yield a measurement of plain copies between two large memory areas."""
    sources, targets = Memory(case), Memory(case)

    def run(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            targets.next()[:] = sources.next()
        return time.perf_counter() - start

    yield run


Put = tuple[Handle, int | None]  # a chunk in the slab, and its digest


class Sender:
    """Puts and announces chunks and frees them late, so that the slab's slots rotate like the targets of plain
    copies."""

    def __init__(self, case: Case, store: KVStore, iid: str, pipe: Connection, woken: int) -> None:
        self._case, self.store, self.iid, self._pipe, self._woken = case, store, iid, pipe, woken
        self._sources = Memory(case)
        self._sent: dict[int, Put] = {}
        self._landed: deque[Put] = deque()
        self._numbers = itertools.count()

    def run(self, count: int, depth: int = 0) -> float:
        """Return the seconds from the first put to the last landed; `depth` chunks in transit (0: the case's)."""
        return self._run(count, depth or self._case.depth, self._has_credit, self._put)

    def again(self, count: int) -> float:
        """Return the seconds from the first announcement to the last landed, for chunks that are still in the slab."""
        return self._run(count, self._case.depth, lambda: bool(self._landed), self._landed.popleft)

    def _run(self, count: int, depth: int, can: Callable[[], bool], chunk: Callable[[], Put]) -> float:
        start = received = time.perf_counter()
        sent = 0
        while sent < count or self._sent:
            if sent < count and len(self._sent) < depth and can():
                self._announce(*chunk())
                sent += 1
                seconds = 0.0
            else:
                seconds = POLL_S
            if self._receive(seconds) or not seconds:
                received = time.perf_counter()
            elif time.perf_counter() - received > PATIENCE_S:
                raise KVError(f"{self._case.transport}: no chunk landed for {PATIENCE_S:g} s")
        return time.perf_counter() - start

    def _has_credit(self) -> bool:
        while self.store.free_slots < self._case.blocks and self._landed:
            self.store.free(self._landed.popleft()[0])
        return self.store.free_slots >= self._case.blocks

    def _put(self) -> Put:
        source, size = self._sources.next(), self._case.block_bytes

        def write(views: Sequence[Block]) -> None:
            for at, view in enumerate(views):
                view[:] = source[at * size : (at + 1) * size]

        return self.store.put(self._case.blocks, write, "p:bench")

    def _announce(self, handle: Handle, digest: int | None) -> None:
        index = next(self._numbers)
        self._sent[index] = handle, digest
        chunk = Chunk(
            src=self.iid,
            incarnation=1,
            rid="bench",
            attempt=1,
            offer=1,
            index=index,
            start=0,
            stop=self._case.blocks,
            handle=handle,
            digest=digest,
        )
        self._pipe.send_bytes(encode(chunk))

    def _receive(self, seconds: float) -> bool:
        """Handle landed chunks and free slots; wait up to `seconds`. Returns whether a message arrived. Raises
        KVError."""
        ready = wait([self._pipe, self._woken], seconds)
        if self._woken in ready:
            os.eventfd_read(self._woken)
            for fetched in self.store.fetched():
                raise KVError(f"unexpected fetch result: {fetched.ticket}")
        self.store.freed()
        while self._pipe.poll():
            answer = decode(self._pipe.recv_bytes(), InboxMessage)
            index = getattr(answer, "index", None)
            if index not in self._sent:
                raise KVError(f"{self._case.transport}: {getattr(answer, 'why', answer)}")
            self._landed.append(self._sent.pop(index))
        return bool(ready)


@contextmanager
def senders(case: Case, digests: Sequence[bool]) -> Iterator[list[Sender]]:
    """Yield a sender for each of `digests`, all to one receiver in another process. Raises KVError."""
    ours, theirs = get_context("spawn").Pipe()
    with ExitStack() as stack:
        core = stack.enter_context(pinned())
        key = os.path.join(stack.enter_context(TemporaryDirectory(prefix="tetri-key-")), "key")
        keys.generate(key)
        arguments = (theirs, case.transport, case.block_bytes, core, key)
        child = get_context("spawn").Process(target=receive, args=arguments, daemon=True)
        child.start()
        theirs.close()
        stack.callback(child.join, PATIENCE_S)
        stack.callback(_end, ours)
        made = [_sender(case, digest, ours, key, stack) for digest in digests]
        ours.send([(sender.iid, sender.store.reach) for sender in made])
        if not ours.poll(PATIENCE_S):
            raise KVError("the receiver did not start")
        answer = ours.recv()
        if not isinstance(answer, Reach):
            raise KVError(str(answer))
        for sender in made:
            sender.store.meet("receiver", answer)
            sender.run(case.places)  # warm up: the receiver maps the slab once
        yield made


def _sender(case: Case, digest: bool, pipe: Connection, key: str, stack: ExitStack) -> Sender:
    woken = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    stack.callback(os.close, woken)
    iid, slots = f"sender-{'with' if digest else 'without'}", case.places * case.blocks
    deployment = f"bench{os.getpid()}"
    settings = StoreSettings(deployment, iid, slots, case.block_bytes, case.transport, digest=digest, key=key)
    with undisturbed():
        store = stack.enter_context(closing(open_store(settings, lambda: os.eventfd_write(woken, 1))))
    return Sender(case, store, iid, pipe, woken)


def _end(pipe: Connection) -> None:
    try:
        pipe.send_bytes(b"")
    except OSError:
        pass  # the receiver has ended already


def measure(case: Case, rounds: int, round_bytes: int, others: Mapping[str, Lane]) -> dict[str, Any]:
    """Return one row: GB/s (10^9 bytes/s) of the path, of a plain copy and of `others` by name. `digest_percent`: how
    much longer the path takes with the digest. READY paths also have the value with put, which the others always
    include."""
    count = max(round_bytes // case.chunk_bytes, 2 * case.depth)
    with ExitStack() as stack:
        with_digest, without = stack.enter_context(senders(case, [True, False]))
        runs: dict[str, Run] = {"path": with_digest.run, "without": without.run}
        if case.transport in READY:
            runs = {"path": with_digest.again, "without": without.again, "with_put": with_digest.run}
        for name, lane in {"memcpy": memcpy, **others}.items():
            runs[name] = stack.enter_context(lane(case))
        seconds = alternated(runs, count, rounds)
    return row(case, count, {name: statistics.median(times) for name, times in seconds.items()})


def alternated(runs: Mapping[str, Run], count: int, rounds: int) -> dict[str, list[float]]:
    """Run all in turns; return the seconds of each round after a warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            elapsed = run(count)
            if number:
                seconds[name].append(elapsed)
    return seconds


def row(case: Case, count: int, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Return the row for the seconds that each variant took for `count` chunks."""
    gbps = {name: count * case.chunk_bytes / elapsed / 1e9 for name, elapsed in seconds.items()}
    found = {
        "transport": case.transport,
        "chunk_mb": round(case.chunk_bytes / 1e6, 2),
        "gbps": round(gbps["path"], 3),
        "memcpy_gbps": round(gbps["memcpy"], 3),
        "ratio": round(gbps["path"] / gbps["memcpy"], 3),
        "digest_percent": round((seconds["path"] / seconds["without"] - 1) * 100, 1),
    }
    if "with_put" in gbps:
        found["gbps_with_put"] = round(gbps["with_put"], 3)
    for name in gbps:
        if name in ("path", "memcpy", "without", "with_put"):
            continue
        found |= {f"{name}_gbps": round(gbps[name], 3), f"{name}_ratio": round(gbps["path"] / gbps[name], 3)}
    return found


def alone(case: Case, rounds: int) -> dict[str, Any]:
    """Return the milliseconds of a single chunk from its put until it has landed."""
    with senders(case, [True]) as (sender,), memcpy(case) as copy:
        seconds = alternated({"path": lambda count: sender.run(count, depth=1), "memcpy": copy}, 1, rounds)
    path, plain = (statistics.median(seconds[name]) * 1e3 for name in ("path", "memcpy"))
    return {
        "transport": case.transport,
        "chunk_mb": round(case.chunk_bytes / 1e6, 2),
        "ms": round(path, 3),
        "memcpy_ms": round(plain, 3),
        "ratio": round(path / plain, 2),
    }
