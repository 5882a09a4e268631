"""A connecting socket and its monitor, which reports a lost peer at once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import count

import zmq

from tetri.net import sockets
from tetri.net.errors import NetError

_number = count()


class Connection:
    """Connects `socket` to `address`. `events`: those that `monitor`, which the caller polls, reports."""

    def __init__(self, context: sockets.Context, socket: sockets.Socket, address: str, events: int) -> None:
        """Raises NetError when the address cannot be connected to."""
        self.socket, self.monitor = socket, context.socket(zmq.PAIR)
        self.monitor.set(zmq.LINGER, 0)
        # Start the monitor before connecting, or it misses the first events.
        endpoint = f"inproc://monitor-{next(_number)}"
        self.socket.monitor(endpoint, events)
        self.monitor.connect(endpoint)
        try:
            self.socket.connect(address)
        except zmq.ZMQError as error:
            self.close()
            raise NetError(f"{address}: cannot connect ({str(error.strerror).lower()})") from None

    def reported(self) -> Iterator[int]:
        """The monitor's events since the last call, in order. An event is the first two bytes of a message;
        zmq.utils.monitor would import asyncio, which takes longer than all of zmq."""
        while int(self.monitor.get(zmq.EVENTS)) & zmq.POLLIN:
            yield int.from_bytes(self.monitor.recv_multipart(zmq.NOBLOCK)[0][:2], sys.byteorder)

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
