"""The six sockets and every option on them. High-water marks count messages, per connection."""

from __future__ import annotations

import os
import sys

import zmq

from tetri.net.address import check, refuse_live_owner
from tetri.net.errors import NetError
from tetri.wire import codec

Socket = zmq.Socket[bytes]
Context = zmq.Context[Socket]

# A worker writes a handful of messages a step, a broker reads thousands a second: this many only wait where
# somebody stands still. What does not fit is not lost silently: the sender is told (False, "full").
INBOX_WAITING = 4096
REPLIES_WAITING = 4096  # a stream's Deltas, for a client that reads slowly
LOADS_WAITING = 1024  # per worker; one says something ten times a second
VIEWS_WAITING = 16  # for a subscriber that stands still; the next one says it all again
SUBMITS_WAITING = 256  # per client; each may have megabytes
RECONNECT_MS = 20  # a restarted worker must be reached well within its two seconds
RECONNECT_MAX_MS = 500
HANDSHAKE_MS = 5000  # a connection that says nothing is given up


def inbox(context: Context, union: codec.Messages) -> Socket:
    """A PULL that takes messages of `union`. libzmq itself cuts a peer that announces a larger frame, before
    any memory is given to it."""
    socket = plain(context, zmq.PULL)
    socket.set(zmq.RCVHWM, INBOX_WAITING)
    socket.set(zmq.MAXMSGSIZE, codec.limit(union))
    return socket


def clients(context: Context, union: codec.Messages) -> Socket:
    """A ROUTER that says when a client is gone or does not read (mandatory) instead of dropping a reply."""
    socket = plain(context, zmq.ROUTER)
    socket.set(zmq.RCVHWM, SUBMITS_WAITING)
    socket.set(zmq.SNDHWM, REPLIES_WAITING)
    socket.set(zmq.MAXMSGSIZE, codec.limit(union))
    socket.set(zmq.ROUTER_MANDATORY, 1)
    return socket


def outbox(context: Context) -> Socket:
    """A PUSH to one peer. `immediate`: nothing queues for a peer that is not there."""
    socket = plain(context, zmq.PUSH)
    socket.set(zmq.SNDHWM, INBOX_WAITING)
    socket.set(zmq.RCVHWM, 1)  # nothing comes back over a PUSH; whoever sends all the same is held short
    socket.set(zmq.MAXMSGSIZE, 1024)
    return trying(socket)


def publisher(context: Context) -> Socket:
    """A PUB: everyone who listens gets it, whoever is slow misses some."""
    socket = plain(context, zmq.PUB)
    socket.set(zmq.SNDHWM, VIEWS_WAITING)
    socket.set(zmq.RCVHWM, 16)  # nothing but subscriptions comes back
    socket.set(zmq.MAXMSGSIZE, 1024)
    return trying(socket)


def subscriber(context: Context, union: codec.Messages, *, newest: bool) -> Socket:
    """A SUB to everything. `newest`: only the newest message is kept, which is safe with one publisher alone: of
    several the last to speak would hide what the others said."""
    socket = plain(context, zmq.SUB)
    socket.set(zmq.RCVHWM, LOADS_WAITING)
    socket.set(zmq.SNDHWM, 16)
    socket.set(zmq.MAXMSGSIZE, codec.limit(union))
    if newest:
        socket.set(zmq.CONFLATE, 1)
    socket.set(zmq.SUBSCRIBE, b"")
    return trying(socket)


def trying(socket: Socket) -> Socket:
    """Connections are made again and again, and nothing waits for one that does not stand."""
    socket.set(zmq.IMMEDIATE, 1)
    socket.set(zmq.RECONNECT_IVL, RECONNECT_MS)
    socket.set(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
    return socket


def plain(context: Context, kind: int) -> Socket:
    """What all sockets have; high-water marks are still to be set."""
    socket = context.socket(kind)
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.IPV6, 0)
    socket.set(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    return socket


class Bound:
    """Where a socket listens. `address` is the real one (a port `*` is replaced)."""

    def __init__(self, socket: Socket, address: str, encrypted: bool = False) -> None:
        """Bind; raises NetError in one line when the address is wrong, in use or not ours to bind."""
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
        """After the socket was closed: remove the file that it may have left, unless it is another's now."""
        if self._path is None:
            return
        try:
            if os.stat(self._path).st_ino == self._inode:
                os.unlink(self._path)
        except FileNotFoundError:
            pass  # libzmq removed it, the usual case


def _why(error: zmq.ZMQError) -> str:
    if error.errno == zmq.EADDRINUSE:
        return "address in use by another process"
    return f"cannot bind ({str(error.strerror).lower()})"


def monitor_event(monitor: Socket) -> int:
    """The event of the next message of a socket's monitor: its first two bytes. Raises zmq.Again when there is none.

    zmq.utils.monitor would import asyncio, which takes longer than all of zmq."""
    return int.from_bytes(monitor.recv_multipart(zmq.NOBLOCK)[0][:2], sys.byteorder)
