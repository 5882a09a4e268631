"""The baseline of bench_transfer for the KV path `stream`: bare pyzmq PUSH and PULL sockets over the TCP loopback with
the same messages (a small frame, then 1 MB), without slab, digest and credit. The bytes are in memory already."""

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
from tetri.net.keys import Key, introduce
from tetri.net.sockets import configure
from tetri.wire.bulk import PIECE_BYTES, Piece
from tetri.wire.codec import encode

WAITING = 16  # queued messages on each side


def pieces(case: Case) -> list[tuple[int, int]]:
    """Return (start, stop) in bytes of each message of a chunk, as the path divides it."""
    return [(at, min(at + PIECE_BYTES, case.chunk_bytes)) for at in range(0, case.chunk_bytes, PIECE_BYTES)]


@contextmanager
def bare(case: Case, encrypted: bool) -> Iterator[Run]:
    """Yield the measurement. `encrypted`: as the path is; otherwise only the kernel touches the bytes."""
    public, secret = zmq.curve_keypair()
    key = Key(public, secret) if encrypted else None
    ours, theirs = get_context("spawn").Pipe()
    with pinned() as core, zmq.Context() as context, context.socket(zmq.PUSH) as push:
        push.set(zmq.LINGER, 0)
        push.set(zmq.SNDHWM, WAITING)
        if key is not None:
            configure(push, {zmq.CURVE_SERVER: 1, zmq.CURVE_SECRETKEY: key.secret})
        port = push.bind_to_random_port("tcp://127.0.0.1")
        child = get_context("spawn").Process(target=_receive, args=(theirs, port, core, key), daemon=True)
        child.start()
        theirs.close()  # so that this process sees the end of the child
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


def _receive(pipe: Connection, port: int, core: int, key: Key | None) -> None:
    os.sched_setaffinity(0, {core})
    keep_freed_memory()
    with zmq.Context() as context, context.socket(zmq.PULL) as pull:
        pull.set(zmq.RCVHWM, WAITING)
        if key is not None:
            introduce(pull, key)
        pull.connect(f"tcp://127.0.0.1:{port}")
        while count := pipe.recv():
            for _ in range(count):
                pull.recv()
                pull.recv(copy=False)
            pipe.send(count)
