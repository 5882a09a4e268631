"""Hubs for tests, and waiting for what happens."""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from live import wait_until

from tetri.net import Hub
from tetri.wire.events import NetEvent, PeerUp
from tetri.wire.messages import InboxMessage

PATIENCE = 5.0  # seconds; only a failing test ever waits so long
until = partial(wait_until, what="it never held", seconds=PATIENCE)


@contextmanager
def hubs(count: int) -> Iterator[list[Hub]]:
    made = [Hub() for _ in range(count)]
    try:
        yield made
    finally:
        for hub in made:
            hub.close()


def events(hub: Hub, enough: Callable[[list[NetEvent]], bool]) -> list[NetEvent]:
    """Poll until `enough(all events so far)`; fails after PATIENCE."""
    seen: list[NetEvent] = []
    end = time.monotonic() + PATIENCE
    while not enough(seen):
        left = end - time.monotonic()
        assert left > 0, f"not seen in {PATIENCE} s; seen: {seen}"
        seen += hub.poll(left)
    return seen


def some(hub: Hub, count: int) -> list[NetEvent]:
    """The next `count` events."""
    seen = events(hub, lambda so_far: len(so_far) >= count)
    assert len(seen) == count, seen
    return seen


def ipc(folder: Path, name: str) -> str:
    return f"ipc://{folder}/{name}"


def plain(address: str) -> socket.socket:
    """A connection to `address` that speaks no ZeroMQ."""
    made = socket.socket(socket.AF_UNIX)
    made.connect(address.removeprefix("ipc://"))
    return made


@contextmanager
def linked(folder: Path) -> Iterator[tuple[Hub, Hub]]:
    """A worker with an inbox "w" in `folder`, and a broker that is connected to it."""
    with hubs(2) as (worker, broker):
        worker.bind_inbox(ipc(folder, "w"), InboxMessage)
        broker.connect("w", ipc(folder, "w"))
        assert some(broker, 1) == [PeerUp("w")]
        yield worker, broker
