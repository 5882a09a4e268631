"""A connecting socket and its monitor, which reports a lost peer at once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import count

import zmq

from tetri.net import sockets
from tetri.net.errors import NetError

_number = count()


def monitored(context: sockets.Context, socket: sockets.Socket, events: int) -> sockets.Socket:
    """A monitor that reports these events of `socket`. Make it before the socket connects or binds, or it misses the
    first ones."""
    monitor = context.socket(zmq.PAIR)
    # Without a limit: libzmq's thread would wait for the reader of a full queue.
    sockets.configure(monitor, {zmq.LINGER: 0, zmq.RCVHWM: 0})
    endpoint = f"inproc://monitor-{next(_number)}"
    socket.monitor(endpoint, events)
    monitor.connect(endpoint)
    return monitor


def reported(monitor: sockets.Socket) -> Iterator[int]:
    """A monitor's events since the last call, in order. An event is the first two bytes of a message;
    zmq.utils.monitor would import asyncio, which takes longer than all of zmq."""
    while int(monitor.get(zmq.EVENTS)) & zmq.POLLIN:
        yield int.from_bytes(monitor.recv_multipart(zmq.NOBLOCK)[0][:2], sys.byteorder)


class Census:
    """Counts who is connected to a socket. Make it before the socket is bound."""

    def __init__(self, context: sockets.Context, socket: sockets.Socket) -> None:
        self._socket = socket
        self._monitor = monitored(context, socket, zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        self._connected = 0

    def connected(self) -> int:
        """How many are connected."""
        for event in reported(self._monitor):
            self._connected += 1 if event == zmq.EVENT_ACCEPTED else -1
        return self._connected

    def close(self) -> None:
        """Stop counting."""
        if not self._socket.closed:
            self._socket.disable_monitor()
        self._monitor.close(0)


class Connection:
    """Connects `socket` to `address`. `events`: those that `monitor`, which the caller polls, reports."""

    def __init__(self, context: sockets.Context, socket: sockets.Socket, address: str, events: int) -> None:
        """Raises NetError when the address cannot be connected to."""
        self.socket, self.monitor = socket, monitored(context, socket, events)
        try:
            self.socket.connect(address)
        except zmq.ZMQError as error:
            self.close()
            raise NetError(f"{address}: cannot connect ({str(error.strerror).lower()})") from None

    def reported(self) -> Iterator[int]:
        """The monitor's events since the last call, in order."""
        return reported(self.monitor)

    def send(self, data: bytes) -> bool:
        """Send without waiting; False when the connection is not up or the queue is full."""
        for _ in range(2):
            try:
                self.socket.send(data, zmq.NOBLOCK)
                return True
            except zmq.Again:  # libzmq notices a new connection only now and then; reading EVENTS makes it look
                self.socket.get(zmq.EVENTS)
        return False

    def close(self) -> None:
        """Close the connection and drop its queue."""
        self.socket.disable_monitor()
        self.monitor.close(0)
        self.socket.close(0)
