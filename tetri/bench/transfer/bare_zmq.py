"""What pyzmq itself can do between two processes, for bench_transfer: PUSH and PULL over TCP's loopback, with the
messages of the KV path `stream` (a small frame, then 1 MB), and nothing else: no slab, no digest, no credit. The bytes
lie ready, and nobody copies them beside the kernel."""

import itertools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection

import zmq

from tetri.bench.transfer.measure import Case, Memory, Run, pinned
from tetri.net.bulk import keep_freed_memory
from tetri.wire.bulk import PIECE_BYTES, Piece
from tetri.wire.codec import encode

WAITING = 16  # messages, on each side


def pieces(case: Case) -> list[tuple[int, int]]:
    """(start, stop) of each message's bytes in a chunk, as the path cuts it."""
    return [(at, min(at + PIECE_BYTES, case.chunk_bytes)) for at in range(0, case.chunk_bytes, PIECE_BYTES)]


@contextmanager
def bare(case: Case, tuned: bool) -> Iterator[Run]:
    """`tuned`: malloc keeps what libzmq frees, as the path sets it in its own process; without, most messages come into
    memory whose pages the kernel has to bring first."""
    ours, theirs = get_context("spawn").Pipe()
    with pinned() as core, zmq.Context() as context, context.socket(zmq.PUSH) as push:
        push.set(zmq.LINGER, 0)
        push.set(zmq.SNDHWM, WAITING)
        port = push.bind_to_random_port("tcp://127.0.0.1")
        child = get_context("spawn").Process(target=_receive, args=(theirs, port, core, tuned), daemon=True)
        child.start()
        theirs.close()  # so that its end is seen here
        sources, numbers = Memory(case), itertools.count()

        def run(count: int) -> float:
            ours.send(count * len(pieces(case)))
            start = time.perf_counter()
            for _ in range(count):
                chunk = sources.next()
                for first, stop in pieces(case):
                    push.send(encode(Piece(number=next(numbers), start=first)), zmq.SNDMORE)
                    push.send(chunk[first:stop], copy=False)
            ours.recv()
            return time.perf_counter() - start

        try:
            yield run
        finally:
            ours.send(0)
            child.join()


def _receive(pipe: Connection, port: int, core: int, tuned: bool) -> None:
    os.sched_setaffinity(0, {core})
    if tuned:
        keep_freed_memory()
    with zmq.Context() as context, context.socket(zmq.PULL) as pull:
        pull.set(zmq.RCVHWM, WAITING)
        pull.connect(f"tcp://127.0.0.1:{port}")
        while count := pipe.recv():
            for _ in range(count):
                pull.recv()
                pull.recv(copy=False)
            pipe.send(count)
