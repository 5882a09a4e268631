"""One socket that connects, and its monitor, which tells of a dead peer at once: a PUSH to a peer, or one side of a
feed (PUB to SUB)."""

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
    """A connection to `peer` that is made again whenever it breaks. `monitor` is to be polled; when it is
    readable, `news()` says what happened."""

    def __init__(
        self,
        context: sockets.Context,
        peer: str,
        address: str,
        make: Callable[[sockets.Context], sockets.Socket] = sockets.outbox,
    ) -> None:
        """`make` makes the socket. Raises NetError when `address` is none. Connecting never fails: nobody there is
        no PeerUp."""
        check(address)
        self.peer = peer
        self.address = address
        self.make = make
        self.up = False
        # libzmq tries again by itself after a lost connection, but never after an answer that is no ZeroMQ.
        # A disconnection without a CONNECT_RETRIED after it shows that it has given up.
        self.given_up = False
        self._given_up_at = 0.0
        try:
            self.socket = make(context)
            self.monitor = context.socket(zmq.PAIR)
        except zmq.ZMQError as error:
            raise NetError(f"{address}: no socket for it ({str(error.strerror).lower()})") from None
        self.monitor.set(zmq.LINGER, 0)
        # A monitor must be there before the connection, or it would miss how that began.
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
        """Hand `data` to libzmq without waiting; False when nobody is connected or the peer does not read."""
        try:
            self.socket.send(data, zmq.NOBLOCK)
            return True
        except zmq.Again:
            pass
        # libzmq looks at a new connection only now and then while sending; asking for EVENTS makes it look.
        if not _ready(self.socket, zmq.POLLOUT):
            return False
        try:
            self.socket.send(data, zmq.NOBLOCK)
            return True
        except zmq.Again:
            return False

    def events(self) -> list[PeerUp | PeerDown]:
        """What the monitor saw since the last call, in order. An attempt that never stood is no news."""
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
        return self.given_up and time.monotonic() - self._given_up_at >= seconds

    def close(self) -> None:
        """Drop the connection and what still waits in it."""
        self.socket.disable_monitor()
        self.monitor.close(0)
        self.socket.close(0)


def _ready(socket: sockets.Socket, direction: int) -> bool:
    return bool(int(socket.get(zmq.EVENTS)) & direction)
