"""The receiver process of the transfer benchmark (measure.py)."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection, wait
from types import FrameType

from tetri.kv import StoreSettings, open_store
from tetri.kv.base import Fetched, KVError, KVStore, Wanted
from tetri.wire.codec import decode, encode
from tetri.wire.handover import Chunk, Drop, Landed
from tetri.wire.messages import InboxMessage


def end_by_signal() -> None:
    """Make SIGTERM and SIGINT end this process with sys.exit, which frees its slab. Later signals are ignored: a signal
    to the process group may be followed by one to each process."""

    def end(number: int, frame: FrameType | None) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_IGN)
        sys.exit(128 + number)

    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, end)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Block both signals in this context: a store that is interrupted while it opens would not free its slab."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def receive(pipe: Connection, transport: str, block_bytes: int, core: int, key: str) -> None:
    """Fetch every announced chunk until an empty message arrives. The first message has the senders' names and
    reaches. `key`: file of the key that they share."""
    end_by_signal()
    os.sched_setaffinity(0, {core})
    woken = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    settings = StoreSettings(f"bench{os.getppid()}", "receiver", 1, block_bytes, transport, key=key)
    with ExitStack() as stack:
        try:
            with undisturbed():
                store = open_store(settings, lambda: os.eventfd_write(woken, 1))
                stack.callback(store.close)
        except KVError as error:
            pipe.send(str(error))
            return
        _meet_and_serve(pipe, store, transport, woken)


def _meet_and_serve(pipe: Connection, store: KVStore, transport: str, woken: int) -> None:
    try:
        for iid, reach in pipe.recv():
            store.meet(iid, reach)
        pipe.send(store.reach)
        _serve(pipe, store, transport, woken)
    except EOFError:
        pass  # the sender has ended


def _serve(pipe: Connection, store: KVStore, transport: str, woken: int) -> None:
    while True:
        due = store.due()
        ready = wait([pipe, woken], None if due is None else max(due - time.monotonic(), 0.0))
        if woken in ready:
            os.eventfd_read(woken)
        for fetched in store.fetched():
            _answer(pipe, fetched)
        if pipe not in ready:
            continue
        data = pipe.recv_bytes()
        if not data:
            return
        chunk = decode(data, InboxMessage)
        assert isinstance(chunk, Chunk)
        wanted = Wanted((chunk.src, chunk.index), chunk.src, transport, chunk.handle, chunk.digest)
        answer = store.fetch(wanted)
        if answer is not None:
            _answer(pipe, answer)


def _answer(pipe: Connection, fetched: Fetched) -> None:
    src, problem = "receiver", fetched.problem
    if problem is None:
        landed = Landed(src=src, incarnation=1, rid="bench", attempt=1, offer=1, index=fetched.ticket[1])
        pipe.send_bytes(encode(landed))
    else:
        drop = Drop(src=src, incarnation=1, rid="bench", attempt=1, offer=1, why=str(problem))
        pipe.send_bytes(encode(drop))
