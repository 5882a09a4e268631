"""Creates the six kinds of sockets and sets all their options. High-water marks are messages per connection."""

from __future__ import annotations

import os
import sys

import zmq

from tetri.net.address import check, refuse_live_owner
from tetri.net.errors import NetError
from tetri.wire import codec

Socket = zmq.Socket[bytes]
Context = zmq.Context[Socket]

# A worker sends a few messages a step and a broker reads thousands a second: a queue this long fills only when the
# reader is stuck. A message that does not fit is not lost silently: the send returns False or "full".
INBOX_WAITING = 4096
REPLIES_WAITING = 4096  # a stream's Deltas, for a client that reads slowly
LOADS_WAITING = 1024  # per worker, which sends ten a second
VIEWS_WAITING = 16  # for a stuck subscriber; each cluster view replaces the one before
SUBMITS_WAITING = 256  # per client; each may have megabytes
RECONNECT_MS = 20  # short: a restarted worker must be connected within two seconds
RECONNECT_MAX_MS = 500
HANDSHAKE_MS = 5000  # a connection without a handshake in this time is closed


def inbox(context: Context, union: codec.Messages) -> Socket:
    """A PULL for messages of `union`. libzmq disconnects a peer that announces a larger frame before it allocates
    memory for the frame."""
    socket = plain(context, zmq.PULL)
    socket.set(zmq.RCVHWM, INBOX_WAITING)
    socket.set(zmq.MAXMSGSIZE, codec.limit(union))
    return socket


def clients(context: Context, union: codec.Messages) -> Socket:
    """A ROUTER for messages of `union`. It raises an error instead of dropping a reply when the client is gone or its
    queue is full (ROUTER_MANDATORY)."""
    socket = plain(context, zmq.ROUTER)
    socket.set(zmq.RCVHWM, SUBMITS_WAITING)
    socket.set(zmq.SNDHWM, REPLIES_WAITING)
    socket.set(zmq.MAXMSGSIZE, codec.limit(union))
    socket.set(zmq.ROUTER_MANDATORY, 1)
    return socket


def outbox(context: Context) -> Socket:
    """A PUSH to one peer. It queues nothing while the peer is not connected (IMMEDIATE)."""
    socket = plain(context, zmq.PUSH)
    socket.set(zmq.SNDHWM, INBOX_WAITING)
    socket.set(zmq.RCVHWM, 1)  # a PUSH receives nothing; this limits a peer that sends anyway
    socket.set(zmq.MAXMSGSIZE, 1024)
    return trying(socket)


def publisher(context: Context) -> Socket:
    """A PUB. A slow subscriber misses messages."""
    socket = plain(context, zmq.PUB)
    socket.set(zmq.SNDHWM, VIEWS_WAITING)
    socket.set(zmq.RCVHWM, 16)  # a PUB receives only subscriptions
    socket.set(zmq.MAXMSGSIZE, 1024)
    return trying(socket)


def subscriber(context: Context, union: codec.Messages, *, newest: bool) -> Socket:
    """A SUB to all messages of `union`. `newest`: keep only the newest message. Use it with a single publisher: the
    newest message of one publisher would replace the messages of the others."""
    socket = plain(context, zmq.SUB)
    socket.set(zmq.RCVHWM, LOADS_WAITING)
    socket.set(zmq.SNDHWM, 16)
    socket.set(zmq.MAXMSGSIZE, codec.limit(union))
    if newest:
        socket.set(zmq.CONFLATE, 1)
    socket.set(zmq.SUBSCRIBE, b"")
    return trying(socket)


def trying(socket: Socket) -> Socket:
    """Make a socket reconnect for ever, and queue nothing while it is not connected."""
    socket.set(zmq.IMMEDIATE, 1)
    socket.set(zmq.RECONNECT_IVL, RECONNECT_MS)
    socket.set(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
    return socket


def plain(context: Context, kind: int) -> Socket:
    """A socket with the options common to all; the caller sets the high-water marks."""
    socket = context.socket(kind)
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.IPV6, 0)
    socket.set(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    return socket


class Bound:
    """A bound address. `address` is the real one, with the port in place of `*`."""

    def __init__(self, socket: Socket, address: str, encrypted: bool = False) -> None:
        """Bind `socket`. Raises NetError when the address is invalid, in use or not permitted."""
        self._path = check(address, encrypted)
        self._inode = 0
        if self._path is not None:
            refuse_live_owner(self._path)
        try:
            socket.bind(address)
        except zmq.ZMQError as error:
            raise NetError(f"{address}: {_why(error)}") from None
        endpoint = socket.get(zmq.LAST_ENDPOINT)
        assert isinstance(endpoint, bytes)
        self.address = endpoint.rstrip(b"\0").decode()
        if self._path is not None:
            self._inode = os.stat(self._path).st_ino

    def remove_file(self) -> None:
        """Remove the socket's file, unless another process has replaced it. Call it after the socket is closed."""
        if self._path is None:
            return
        try:
            if os.stat(self._path).st_ino == self._inode:
                os.unlink(self._path)
        except FileNotFoundError:
            pass  # libzmq has removed it, the usual case


def _why(error: zmq.ZMQError) -> str:
    if error.errno == zmq.EADDRINUSE:
        return "address in use by another process"
    return f"cannot bind ({str(error.strerror).lower()})"


def monitor_event(monitor: Socket) -> int:
    """The event of the next message of a socket's monitor: its first two bytes. Raises zmq.Again when there is none.

    zmq.utils.monitor would import asyncio, which takes longer than all of zmq."""
    return int.from_bytes(monitor.recv_multipart(zmq.NOBLOCK)[0][:2], sys.byteorder)
