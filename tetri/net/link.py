"""A connecting socket and its monitor, which reports a lost peer at once. The socket is a PUSH to a peer, or a PUB or
SUB."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count

import zmq

from tetri.net import sockets
from tetri.net.address import check
from tetri.net.errors import NetError
from tetri.wire.events import PeerDown, PeerUp

_monitor_number = count()


class PeerLink:
    """A connection to `peer` that reconnects when it breaks. The caller polls `monitor` and calls `events` when it is
    readable. `up`: connected; `given_up`: libzmq no longer reconnects."""

    def __init__(
        self,
        context: sockets.Context,
        peer: str,
        address: str,
        make: Callable[[sockets.Context], sockets.Socket] = sockets.outbox,
    ) -> None:
        """`make` creates the socket. Raises NetError when the address is invalid. An address where no process listens
        is no error: there is just no PeerUp."""
        check(address)
        self.peer = peer
        self.address = address
        self.make = make
        self.up = False
        # libzmq reconnects after a lost connection, but not after an answer that is not ZeroMQ. It has given up when
        # no CONNECT_RETRIED follows DISCONNECTED.
        self.given_up = False
        self._given_up_at = 0.0
        try:
            self.socket = make(context)
            self.monitor = context.socket(zmq.PAIR)
        except zmq.ZMQError as error:
            raise NetError(f"{address}: cannot create a socket ({str(error.strerror).lower()})") from None
        self.monitor.set(zmq.LINGER, 0)
        # Start the monitor before connecting, or it misses the first events.
        endpoint = f"inproc://monitor-{next(_monitor_number)}"
        seen = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED
        self.socket.monitor(endpoint, seen)
        self.monitor.connect(endpoint)
        try:
            self.socket.connect(address)
        except zmq.ZMQError as error:
            self.close()
            raise NetError(f"{address}: cannot connect ({str(error.strerror).lower()})") from None

    def send(self, data: bytes) -> bool:
        """Queue `data` without waiting; False when the peer is not connected or its queue is full."""
        try:
            self.socket.send(data, zmq.NOBLOCK)
            return True
        except zmq.Again:
            pass
        # libzmq notices a new connection only now and then while sending; reading EVENTS makes it look.
        if not _ready(self.socket, zmq.POLLOUT):
            return False
        try:
            self.socket.send(data, zmq.NOBLOCK)
            return True
        except zmq.Again:
            return False

    def events(self) -> list[PeerUp | PeerDown]:
        """Connections and disconnections since the last call, in order. A failed attempt to connect gives no event."""
        seen: list[PeerUp | PeerDown] = []
        while _ready(self.monitor, zmq.POLLIN):
            event = sockets.monitor_event(self.monitor)
            up = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
            self.given_up = event == zmq.EVENT_DISCONNECTED
            self._given_up_at = time.monotonic()
            if up != self.up:
                self.up = up
                seen.append(PeerUp(self.peer) if up else PeerDown(self.peer))
        return seen

    def given_up_for(self, seconds: float) -> bool:
        """Whether libzmq gave up at least `seconds` ago."""
        return self.given_up and time.monotonic() - self._given_up_at >= seconds

    def close(self) -> None:
        """Close the connection and drop its queue."""
        self.socket.disable_monitor()
        self.monitor.close(0)
        self.socket.close(0)


def _ready(socket: sockets.Socket, direction: int) -> bool:
    return bool(int(socket.get(zmq.EVENTS)) & direction)
