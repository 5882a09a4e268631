"""All sockets of one process behind one class: bind, connect, send, reply, publish, subscribe, poll, close."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Literal

import msgspec
import zmq

from tetri.net import descriptors, sockets
from tetri.net.connection import Census
from tetri.net.errors import NetError
from tetri.net.intake import Intake
from tetri.net.link import PeerLink
from tetri.net.turnstile import files_left
from tetri.wire import codec
from tetri.wire.codec import Messages
from tetri.wire.events import NetEvent, PeerDown, PeerUp

RETRY_S = 0.5  # delay before a publish or subscribe connection that libzmq gave up is opened again
Sent = Literal["sent", "full", "gone"]


class Hub:
    """All sockets of one process. Belongs to one thread; other threads may only call `wake()`.

    `counters` never reset: received, received_bytes, sent, sent_bytes, published, published_bytes, would_block,
    no_peer, replies_full, replies_gone, and garbage_<kind> for dropped messages (kinds: frames, and those of
    codec.WireError). `unsent`: messages that `send` refused, by `full_<peer>` (its queue was full) and `away_<peer>`.
    `more`: the last `poll` read as many messages of a socket as it may at a time, so others may wait.
    """

    def __init__(self, log: logging.Logger | None = None) -> None:
        self.counters: Counter[str] = Counter()
        self.unsent: Counter[str] = Counter()
        self.more = False
        self._log = log or logging.getLogger("tetri.net")
        self._context: sockets.Context = zmq.Context()
        self._poller = zmq.Poller()
        self._intakes: dict[sockets.Socket, Intake] = {}
        self._bounds: list[sockets.Bound] = []
        self._routers: list[sockets.Socket] = []
        self._censuses: list[Census] = []
        self._outlet: sockets.Socket | PeerLink | None = None  # the socket of publish()
        self._feeds: list[PeerLink] = []  # PUB or SUB sockets that connect
        self._links: dict[str, PeerLink] = {}
        self._unopened: dict[str, str] = {}  # peer -> address, for want of descriptors
        self._monitors: dict[sockets.Socket, PeerLink] = {}
        self._encoded: tuple[msgspec.Struct | None, bytes] = (None, b"")  # the last message that `send` encoded
        self._wake_read, self.wake_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._poller.register(self._wake_read, zmq.POLLIN)

    def bind_inbox(self, address: str, union: Messages) -> str:
        """Receive messages of `union` at `address`; returns the real address, with the port in place of `*`. Raises
        NetError when the address is invalid or in use."""
        return self._bind(sockets.inbox(self._context, union), address, union)

    def bind_clients(self, address: str, union: Messages, most: int | None = None) -> str:
        """As bind_inbox, for clients that `reply` can answer. When `most` are connected to an `ipc://` address, further
        ones wait; up to WAITING more can enter together with the last. A hub may listen for clients at several
        addresses: what a client sends and what it is answered goes through the same one."""
        router = sockets.clients(self._context, union)
        census = Census(self._context, router)
        self._censuses.append(census)

        def may_enter() -> bool:
            return files_left() and (most is None or census.connected() < most)

        real = self._bind(router, address, union, bytes([len(self._routers)]), may_enter=may_enter)
        self._routers.append(router)
        return real

    def bind_subscriber(self, address: str, union: Messages) -> str:
        """As bind_inbox, for publishers. Publishers never wait: messages that are not read in time are lost."""
        return self._bind(sockets.subscriber(self._context, union, newest=False), address, union)

    def _bind(
        self,
        socket: sockets.Socket,
        address: str,
        union: Messages,
        router: bytes | None = None,
        may_enter: Callable[[], bool] = files_left,
    ) -> str:
        real = self._bound(socket, address, may_enter)
        self._read_from(socket, real, union, router)
        return real

    def _bound(self, socket: sockets.Socket, address: str, may_enter: Callable[[], bool] = files_left) -> str:
        try:
            self._bounds.append(sockets.Bound(socket, address, may_enter=may_enter, log=self._log))
        except NetError:
            socket.close(0)
            raise
        return self._bounds[-1].address

    def _read_from(self, socket: sockets.Socket, address: str, union: Messages, router: bytes | None = None) -> None:
        self._intakes[socket] = Intake(socket, address, union, router, self.counters, self._log)
        self._poller.register(socket, zmq.POLLIN)

    def bind_publisher(self, address: str) -> str:
        """Let peers subscribe at `address` to what publish() sends; returns the real address. One publisher per hub.
        Raises NetError when the address is invalid or in use."""
        self._only_one_outlet(address)
        socket = sockets.publisher(self._context)
        real = self._bound(socket, address)
        self._outlet = socket
        return real

    def connect_publisher(self, address: str) -> None:
        """Send what publish() sends to the subscriber bound at `address`, while there is one. One publisher per
        hub."""
        self._only_one_outlet(address)
        self._outlet = self._feed(address, sockets.publisher)

    def _only_one_outlet(self, address: str) -> None:
        if self._outlet is not None:
            raise NetError(f"{address}: this process already publishes")

    def publish(self, message: msgspec.Struct) -> None:
        """Send to all subscribers without waiting; delivery is not confirmed. Raises WireError for a message over the
        size limit."""
        if self._outlet is None:
            raise NetError("publish without bind_publisher or connect_publisher")
        data = codec.encode(message)
        socket = self._outlet.socket if isinstance(self._outlet, PeerLink) else self._outlet
        with suppress(zmq.Again):
            socket.send(data, zmq.NOBLOCK)
        self.counters["published"] += 1
        self.counters["published_bytes"] += len(data)

    def subscribe(self, address: str, union: Messages) -> None:
        """Receive from the single publisher at `address`, while there is one. Only the newest message is kept; a slow
        reader misses the older ones."""
        make = partial(sockets.subscriber, union=union, newest=True)
        link = self._feed(address, make)
        self._read_from(link.socket, address, union)

    def _feed(self, address: str, make: sockets.Make) -> PeerLink:
        link = PeerLink(self._context, "", address, make)
        self._feeds.append(link)
        self._watch(link)
        return link

    def _retry_feeds(self) -> None:
        for at, old in enumerate(self._feeds):
            if not old.given_up_for(RETRY_S):
                continue
            try:
                new = PeerLink(self._context, "", old.address, old.make)
            except NetError:  # no descriptor is left: the next poll tries again
                continue
            self._feeds[at] = new
            self._unwatch(old)
            self._watch(new)
            intake = self._intakes.pop(old.socket, None)
            if intake is not None:
                self._poller.unregister(old.socket)
                self._poller.register(new.socket, zmq.POLLIN)
                intake.socket = new.socket
                self._intakes[new.socket] = intake
            self._outlet = new if self._outlet is old else self._outlet
            old.close()

    def _watch(self, link: PeerLink) -> None:
        self._monitors[link.monitor] = link
        self._poller.register(link.monitor, zmq.POLLIN)

    def _unwatch(self, link: PeerLink) -> None:
        self._poller.unregister(link.monitor)
        del self._monitors[link.monitor]

    def connect(self, peer: str, address: str) -> None:
        """Connect to `peer` at `address`. The same address again changes nothing; another address replaces the
        connection without a PeerDown. `poll` returns PeerUp when the connection is up. Raises NetError when the
        address is invalid; the old connection then stays. Also when no descriptors are left: then each `send` to the
        peer tries again."""
        old = self._links.get(peer)
        if old is not None and old.address == address and not old.given_up:
            return
        self._open(peer, address)

    def _open(self, peer: str, address: str) -> None:
        if descriptors.left() < 0:
            self._unopened[peer] = address
            raise NetError(f"{address}: cannot connect (too many open files: {descriptors.used()})")
        link = PeerLink(self._context, peer, address)
        self.disconnect(peer)
        self._links[peer] = link
        self._watch(link)

    def disconnect(self, peer: str) -> None:
        """Close the connection to `peer` and drop its queue; no PeerDown follows. An unknown peer is no error."""
        self._unopened.pop(peer, None)
        link = self._links.pop(peer, None)
        if link is None:
            return
        self._unwatch(link)
        link.close()

    def send(self, peer: str, message: msgspec.Struct) -> bool:
        """Send without waiting. False: the peer is unknown, not up, or its queue is full. True: queued, which does not
        guarantee delivery. Raises WireError for a message over the size limit."""
        link = self._links.get(peer)
        if link is None or not link.up:
            self.counters["no_peer"] += 1
            self.unsent[f"away_{peer}"] += 1
            self._reopen(peer, link)
            return False
        data = self._encode(message)
        if not link.send(data):
            self.counters["would_block"] += 1
            self.unsent[f"full_{peer}"] += 1
            return False
        self._count_sent(data)
        return True

    def _reopen(self, peer: str, link: PeerLink | None) -> None:
        """Connect again where libzmq has given up or no descriptors were left. Here and not in `poll`: as often as the
        core sends."""
        address = self._unopened.get(peer) if link is None else link.address if link.given_up else None
        if address is not None:
            with suppress(NetError):  # still none left: counted as no_peer, and the next send tries again
                self._open(peer, address)

    def reply(self, client: bytes, message: msgspec.Struct) -> Sent:
        """Reply to a client without waiting. "full": the client's queue is full; "gone": the client is not
        connected."""
        if not self._routers:
            raise NetError("reply without bind_clients")
        data = codec.encode(message)
        router = self._routers[client[0]]  # see Intake
        try:
            # As send_multipart, in less than half the time: that looks at the type of each part first.
            router.send(client[1:], zmq.NOBLOCK | zmq.SNDMORE)
            router.send(data, zmq.NOBLOCK)
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

    def _encode(self, message: msgspec.Struct) -> bytes:
        """Encode a message, or return the last encoding if it is the same object: a core sends one message to many
        peers in a row."""
        if message is not self._encoded[0]:
            self._encoded = (message, codec.encode(message))
        return self._encoded[1]

    def _count_sent(self, data: bytes) -> None:
        self.counters["sent"] += 1
        self.counters["sent_bytes"] += len(data)

    def poll(self, timeout: float | None) -> list[NetEvent]:
        """Wait for events for at most `timeout` seconds (None: no limit; 0 or less: not at all) and return them.

        Messages come before PeerUp and PeerDown, so that the last messages of a dead peer are handled first. The
        number of messages per socket is limited; the next call returns the rest (`more`). The list is empty after the
        timeout, a signal or a wake().
        """
        self._retry_feeds()
        self.more = False
        arrived: list[NetEvent] = []
        events: list[PeerUp | PeerDown] = []
        if any(link.given_up for link in self._feeds):
            timeout = RETRY_S if timeout is None else min(timeout, RETRY_S)
        for source, _ in self._poller.poll(sockets.milliseconds(timeout)):
            if source in self._intakes:
                intake = self._intakes[source]
                arrived += intake.read()
                self.more = self.more or intake.more
            elif source in self._monitors:
                link = self._monitors[source]
                seen = link.events()
                if link.peer:
                    events += seen
            else:
                with suppress(BlockingIOError):  # until the pipe is empty
                    while len(os.read(self._wake_read, 4096)) == 4096:
                        pass
        return arrived + events

    def wait(self, seconds: float) -> bool:
        """Sleep for `seconds`; then return whether a message or event waits for `poll`. Reads nothing. Messages from
        `subscribe` do not count: they are periodic reports that need no answer."""
        time.sleep(max(0.0, seconds))
        published = [link.socket for link in self._feeds]
        return any(source not in published for source, _ in self._poller.poll(0))

    def wake(self) -> None:
        """End the current or the next `poll` at once. Callable from any thread. `wake_fd` is for set_wakeup_fd."""
        with suppress(BlockingIOError):  # the pipe is full: poll wakes anyway
            os.write(self.wake_fd, b"\0")

    def close(self) -> None:
        """Close all connections, drop their queues and remove the socket files. A second call does nothing."""
        if self._context.closed:
            return
        for peer in list(self._links):
            self.disconnect(peer)
        for link in self._feeds:
            self._unwatch(link)
            link.close()
        for bound in self._bounds:
            bound.close()
        for census in self._censuses:
            census.close()
        for socket in self._intakes:
            socket.close(0)  # closing twice is harmless: the sockets of feeds are closed already
        if isinstance(self._outlet, zmq.Socket):
            self._outlet.close(0)
        self._context.term()
        os.close(self._wake_read)
        os.close(self.wake_fd)
