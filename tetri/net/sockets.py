"""Creates the six kinds of sockets and sets all their options. High-water marks are messages per connection."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from logging import Logger

import zmq

from tetri.net.address import check, refuse_live_owner
from tetri.net.errors import NetError
from tetri.net.turnstile import Turnstile, files_left
from tetri.wire import codec

Socket = zmq.Socket[bytes]
Context = zmq.Context[Socket]
Options = Mapping[int, int | bytes]
Make = Callable[[Context], Socket]
_LOG = logging.getLogger("tetri.net")

# A worker sends a few messages a step and a broker reads thousands a second: a queue this long fills only when the
# reader is stuck. A message that does not fit is not lost silently: the send returns False or "full".
INBOX_WAITING = 4096
REPLIES_WAITING = 4096  # a stream's Deltas, for a client that reads slowly
LOADS_WAITING = 1024  # per worker, which sends ten a second
VIEWS_WAITING = 16  # for a stuck subscriber; each cluster view replaces the one before
SUBMITS_WAITING = 256  # per client; each may have megabytes
RECONNECT_MS = 20  # short: a restarted worker must be connected within two seconds
RECONNECT_MAX_MS = 500
_LONGEST_MS = 1 << 30  # zmq takes a C int; after twelve days the loop just polls again
HANDSHAKE_MS = 5000  # a connection without a handshake in this time is closed
# Reconnect for ever, and queue nothing while not connected.
TRYING: Options = {zmq.IMMEDIATE: 1, zmq.RECONNECT_IVL: RECONNECT_MS, zmq.RECONNECT_IVL_MAX: RECONNECT_MAX_MS}


def inbox(context: Context, union: codec.Messages) -> Socket:
    """A PULL for messages of `union`. libzmq disconnects a peer that announces a larger frame before it allocates
    memory for the frame."""
    return plain(context, zmq.PULL, {zmq.RCVHWM: INBOX_WAITING, zmq.MAXMSGSIZE: codec.limit(union)})


def clients(context: Context, union: codec.Messages) -> Socket:
    """A ROUTER for messages of `union`. It raises an error instead of dropping a reply when the client is gone or its
    queue is full (ROUTER_MANDATORY)."""
    waiting: Options = {zmq.RCVHWM: SUBMITS_WAITING, zmq.SNDHWM: REPLIES_WAITING}
    return plain(context, zmq.ROUTER, {**waiting, zmq.MAXMSGSIZE: codec.limit(union), zmq.ROUTER_MANDATORY: 1})


def outbox(context: Context) -> Socket:
    """A PUSH to one peer. It queues nothing while the peer is not connected (IMMEDIATE)."""
    # A PUSH receives nothing; the limit of 1 is for a peer that sends anyway.
    return plain(context, zmq.PUSH, {zmq.SNDHWM: INBOX_WAITING, zmq.RCVHWM: 1, zmq.MAXMSGSIZE: 1024, **TRYING})


def publisher(context: Context) -> Socket:
    """A PUB. A slow subscriber misses messages."""
    # A PUB receives only subscriptions.
    return plain(context, zmq.PUB, {zmq.SNDHWM: VIEWS_WAITING, zmq.RCVHWM: 16, zmq.MAXMSGSIZE: 1024, **TRYING})


def subscriber(context: Context, union: codec.Messages, *, newest: bool) -> Socket:
    """A SUB to all messages of `union`. `newest`: keep only the newest message. Use it with a single publisher: the
    newest message of one publisher would replace the messages of the others."""
    waiting: Options = {zmq.RCVHWM: LOADS_WAITING, zmq.SNDHWM: 16, zmq.CONFLATE: int(newest)}
    return plain(context, zmq.SUB, {**waiting, zmq.MAXMSGSIZE: codec.limit(union), zmq.SUBSCRIBE: b"", **TRYING})


def plain(context: Context, kind: int, options: Options) -> Socket:
    """A socket with these options, high-water marks among them, and those common to all."""
    socket = context.socket(kind)
    configure(socket, {zmq.LINGER: 0, zmq.IPV6: 0, zmq.HANDSHAKE_IVL: HANDSHAKE_MS, **options})
    return socket


def configure(socket: Socket, options: Options) -> None:
    """Set these options."""
    for option, value in options.items():
        socket.set(option, value)


def milliseconds(seconds: float | None) -> int | None:
    """The timeout of a poll; None: no limit."""
    if seconds is None:
        return None
    return min(max(0, math.ceil(seconds * 1000)), _LONGEST_MS)  # rounded up: 0.4 ms must not become a busy loop


class Bound:
    """A bound address. `address` is the real one, with the port in place of `*`."""

    def __init__(
        self,
        socket: Socket,
        address: str,
        encrypted: bool = False,
        may_enter: Callable[[], bool] = files_left,
        log: Logger = _LOG,
    ) -> None:
        """Bind `socket`. `may_enter`: whether an `ipc://` address may let more connections in; a thread asks. Raises
        NetError when the address is invalid, in use or not permitted."""
        path = check(address, encrypted)
        self._turnstile: Turnstile | None = None
        if path is not None:
            refuse_live_owner(path)
        try:
            if path is not None:
                self._turnstile = Turnstile(socket, path, may_enter, log)
            else:
                socket.bind(address)
        except (OSError, zmq.ZMQError) as error:
            in_use = error.errno == zmq.EADDRINUSE
            why = "address in use by another process" if in_use else f"cannot bind ({str(error.strerror).lower()})"
            raise NetError(f"{address}: {why}") from None
        endpoint = socket.get(zmq.LAST_ENDPOINT)
        assert isinstance(endpoint, bytes)
        self.address = address if self._turnstile is not None else endpoint.rstrip(b"\0").decode()

    def close(self) -> None:
        """Let nobody in any more, and remove the socket's files unless another process has replaced them. Call it
        before the socket is closed."""
        if self._turnstile is not None:
            self._turnstile.close()
