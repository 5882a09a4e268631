"""All sockets of one process behind six verbs: bind, connect, send, reply, poll, close."""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from contextlib import suppress
from types import UnionType
from typing import Literal

import msgspec
import zmq

from tetri.net import sockets
from tetri.net.errors import NetError
from tetri.net.intake import Intake
from tetri.net.link import Link
from tetri.wire import codec
from tetri.wire.events import NetEvent, PeerDown, PeerUp

_LONGEST_MS = 1 << 30  # zmq takes a C int; the loop just polls once more after twelve days
Sent = Literal["sent", "full", "gone"]


class Hub:
    """The network as one process sees it. Belongs to one thread; only `wake()` may be called from others.

    `counters` grow for ever: received, received_bytes, sent, sent_bytes, would_block, no_peer, replies_full,
    replies_gone, and garbage_<kind> for what was dropped (kinds: frames, and those of codec.WireError).
    """

    def __init__(self, log: logging.Logger | None = None) -> None:
        self.counters: Counter[str] = Counter()
        self._log = log or logging.getLogger("tetri.net")
        self._context: sockets.Context = zmq.Context()
        self._poller = zmq.Poller()
        self._intakes: dict[sockets.Socket, Intake] = {}
        self._router: sockets.Socket | None = None
        self._links: dict[str, Link] = {}
        self._monitors: dict[sockets.Socket, Link] = {}
        self._wake_read, self.wake_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._poller.register(self._wake_read, zmq.POLLIN)

    def bind_inbox(self, address: str, union: UnionType) -> str:
        """Take messages of `union` at `address`; returns the real address. Raises NetError: wrong, in use."""
        return self._bind(sockets.inbox(self._context, union), address, union, identities=False)

    def bind_clients(self, address: str, union: UnionType) -> str:
        """As bind_inbox, from clients that can be replied to; once per hub."""
        if self._router is not None:
            raise NetError(f"{address}: this process already listens for clients")
        router = sockets.clients(self._context, union)
        real = self._bind(router, address, union, identities=True)
        self._router = router
        return real

    def _bind(self, socket: sockets.Socket, address: str, union: UnionType, identities: bool) -> str:
        try:
            bound = sockets.Bound(socket, address)
        except NetError:
            socket.close(0)
            raise
        self._intakes[socket] = Intake(socket, bound, union, identities, self.counters, self._log)
        self._poller.register(socket, zmq.POLLIN)
        return bound.address

    def connect(self, peer: str, address: str) -> None:
        """Write to `peer` at `address` from now on. The same address again changes nothing; another one
        replaces the connection, without a PeerDown. Raises NetError when `address` is none, the old
        connection then stays. PeerUp comes out of poll as soon as somebody answers there."""
        old = self._links.get(peer)
        if old is not None and old.address == address and not old.given_up:
            return
        self._open(peer, address)

    def _open(self, peer: str, address: str) -> None:
        link = Link(self._context, peer, address)
        self.disconnect(peer)
        self._links[peer] = link
        self._monitors[link.monitor] = link
        self._poller.register(link.monitor, zmq.POLLIN)

    def disconnect(self, peer: str) -> None:
        """Forget `peer` and what still waits for it; no PeerDown follows. An unknown peer is fine."""
        link = self._links.pop(peer, None)
        if link is None:
            return
        self._poller.unregister(link.monitor)
        del self._monitors[link.monitor]
        link.close()

    def send(self, peer: str, message: msgspec.Struct) -> bool:
        """Never waits. False: no such peer, none between its PeerUp and its PeerDown, or it does not read.
        True: handed over, which is no promise that it arrives. Raises WireError for one over the limit."""
        link = self._links.get(peer)
        if link is None or not link.up:
            self.counters["no_peer"] += 1
            if link is not None and link.given_up:
                self._open(peer, link.address)  # here and not in poll: as often as the core tries, no more
            return False
        data = codec.encode(message)
        if not link.send(data):
            self.counters["would_block"] += 1
            return False
        self._count_sent(data)
        return True

    def reply(self, client: bytes, message: msgspec.Struct) -> Sent:
        """Never waits. "full": the client does not read; "gone": no such client (any more)."""
        if self._router is None:
            raise NetError("reply without bind_clients")
        data = codec.encode(message)
        try:
            self._router.send_multipart((client, data), zmq.NOBLOCK)
        except zmq.Again:
            self.counters["replies_full"] += 1
            return "full"
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self.counters["replies_gone"] += 1
            return "gone"
        self._count_sent(data)
        return "sent"

    def _count_sent(self, data: bytes) -> None:
        self.counters["sent"] += 1
        self.counters["sent_bytes"] += len(data)

    def poll(self, timeout: float | None) -> list[NetEvent]:
        """What happened, waiting for it at most `timeout` seconds (None: for ever; 0 or less: not at all).

        Messages come before the news of peers: what a peer managed to say before it died is read first.
        Bounded per socket, so there may be more at once; empty after the time, a signal or a wake().
        """
        arrived: list[NetEvent] = []
        news: list[PeerUp | PeerDown] = []
        for source, _ in self._poller.poll(_milliseconds(timeout)):
            if source in self._intakes:
                arrived += self._intakes[source].read()
            elif source in self._monitors:
                news += self._monitors[source].news()
            else:
                _empty(self._wake_read)
        return arrived + news

    def wake(self) -> None:
        """End the present or the next poll at once. From any thread; `wake_fd` is for set_wakeup_fd."""
        with suppress(BlockingIOError):  # the pipe is full of wake-ups already
            os.write(self.wake_fd, b"\0")

    def close(self) -> None:
        """Drop every connection and what waits in it, remove the socket files. A second call does nothing."""
        if self._context.closed:
            return
        for peer in list(self._links):
            self.disconnect(peer)
        for socket in self._intakes:
            socket.close(0)
        self._context.term()
        for intake in self._intakes.values():
            intake.bound.remove_file()
        os.close(self._wake_read)
        os.close(self.wake_fd)


def _milliseconds(timeout: float | None) -> int | None:
    if timeout is None:
        return None
    return min(
        max(0, math.ceil(timeout * 1000)), _LONGEST_MS
    )  # rounded up: 0.4 ms must not become a busy loop


def _empty(pipe: int) -> None:
    with suppress(BlockingIOError):
        while len(os.read(pipe, 4096)) == 4096:
            pass
