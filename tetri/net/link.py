"""A connection that reconnects. The socket is a PUSH to a peer, or a PUB or SUB."""

from __future__ import annotations

import time

import zmq

from tetri.net import sockets
from tetri.net.address import check
from tetri.net.connection import Connection
from tetri.net.errors import NetError
from tetri.wire.events import PeerDown, PeerUp


class PeerLink(Connection):
    """A connection to `peer` that reconnects when it breaks. The caller polls `monitor` and calls `events` when it is
    readable. `up`: connected; `given_up`: libzmq no longer reconnects."""

    def __init__(self, context: sockets.Context, peer: str, address: str, make: sockets.Make = sockets.outbox) -> None:
        """`make` creates the socket. Raises NetError when the address is invalid. An address where no process listens
        is no error: there is just no PeerUp."""
        check(address)
        self.peer, self.address, self.make, self.up = peer, address, make, False
        # libzmq reconnects after a lost connection, but not after an answer that is not ZeroMQ. It has given up when
        # no CONNECT_RETRIED follows DISCONNECTED.
        self.given_up = False
        self._given_up_at = 0.0
        seen = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED
        try:
            super().__init__(context, make(context), address, seen)
        except zmq.ZMQError as error:
            raise NetError(f"{address}: cannot create a socket ({str(error.strerror).lower()})") from None

    def events(self) -> list[PeerUp | PeerDown]:
        """Connections and disconnections since the last call, in order. A failed attempt to connect gives no event."""
        seen: list[PeerUp | PeerDown] = []
        for event in self.reported():
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
