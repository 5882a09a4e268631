"""What a chunk costs through the shm store: `python -m tests.kv.bench_shm [--json]`. Not a test.

Two processes on two cores; the figure is the median time of put (the engine's copy into the slab and the
digest) and take (the copy out and the digest), beside a plain memcpy of as many bytes in one process.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection

import xxhash

from tetri.kv.shm import ShmStore

BLOCKS, BLOCK_BYTES, SLOTS, ROUNDS = 4, 3 << 20, 64, 60


def _pin(core: int) -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[core % len(cores)]})


def receiver(pipe: Connection) -> None:
    _pin(1)
    store = ShmStore("bench", "receiver", 1, BLOCK_BYTES)
    pipe.send("ready")
    while (work := pipe.recv()) is not None:
        pipe.send(_timed(lambda: store.take(*work)))
    store.close()


def _timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure() -> dict[str, float]:
    """Milliseconds, medians unless named `first_`, and the ratios to memcpy."""
    here, there = get_context("spawn").Pipe()
    child = get_context("spawn").Process(target=receiver, args=(there,))
    child.start()
    _pin(0)
    size = BLOCKS * BLOCK_BYTES
    source = bytearray(os.urandom(1 << 20) * (size >> 20))
    view, target = memoryview(source), memoryview(bytearray(SLOTS * BLOCK_BYTES))
    places = itertools.cycle(range(0, len(target), size))

    def plain_copy() -> None:  # to changing places, as the slab's slots change: one place would stay cached
        start = next(places)
        target[start : start + size] = view

    def copy_in(slots: object) -> None:
        for at, slot in enumerate(slots):  # type: ignore[call-overload]
            slot[:] = view[at * BLOCK_BYTES : (at + 1) * BLOCK_BYTES]

    here.recv()
    memcpy = [_timed(plain_copy) for _ in range(ROUNDS)]
    digest = [_timed(lambda: xxhash.xxh3_64_intdigest(source)) for _ in range(ROUNDS)]
    store: list[ShmStore] = []
    start = _timed(lambda: store.append(ShmStore("bench", "sender", SLOTS, BLOCK_BYTES)))
    puts, takes, held = [], [], []
    for _ in range(ROUNDS):
        puts.append(_timed(lambda: held.append(store[0].put(BLOCKS, copy_in))))
        here.send(held[-1])
        takes.append(here.recv())
        if len(held) > 4:
            store[0].free(held.pop(0)[0])
    here.send(None)
    child.join()
    store[0].close()
    ms = {
        name: statistics.median(times) * 1e3
        for name, times in [("memcpy", memcpy), ("digest", digest), ("put", puts), ("take", takes)]
    }
    ratios = {
        "put_take_to_memcpy": (ms["put"] + ms["take"]) / ms["memcpy"],
        "floor": 2 + 2 * ms["digest"] / ms["memcpy"],
    }
    first = {
        "first_put": puts[0] * 1e3,
        "first_take": takes[0] * 1e3,
        f"start_{SLOTS * BLOCK_BYTES >> 20}_mb": start * 1e3,
    }
    return {name: round(value, 3) for name, value in (ms | ratios | first).items()}


if __name__ == "__main__":
    result = measure()
    print(
        json.dumps(result) if "--json" in sys.argv else "\n".join(f"{k:>20} {v}" for k, v in result.items())
    )
