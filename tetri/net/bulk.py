"""The sockets of the KV path `stream`: a ROUTER that serves a slab's bytes, a DEALER to each server that is read.

Messages to a server are one frame, messages from it one frame (wire/bulk.py) and, behind a Piece, one frame of bytes.
All of one path's sockets belong to one thread each; `Bell` is how others wake it.
"""

from __future__ import annotations

import ctypes
import math
import os
from contextlib import suppress
from itertools import count
from threading import RLock

import zmq

from tetri.net import sockets
from tetri.net.address import check
from tetri.net.errors import NetError
from tetri.net.keys import Key, guard, introduce
from tetri.wire.bulk import HEADER_BYTES, PIECE_BYTES, REQUEST_BYTES

PIECES_WAITING = 4096  # for one receiver: its credit ends before that
REQUESTS_WAITING = 512  # of one receiver; it has at most half as many fetches at once
UNANSWERED_MS = 10_000  # bytes that the other host does not acknowledge for so long end a connection
_KEEPALIVE = {  # seconds, seconds, probes
    zmq.TCP_KEEPALIVE: 1,
    zmq.TCP_KEEPALIVE_IDLE: 30,
    zmq.TCP_KEEPALIVE_INTVL: 10,
    zmq.TCP_KEEPALIVE_CNT: 3,
}
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_CURVE_BYTES = 64  # an encrypted frame is longer, and libzmq measures it as it comes
_number = count()
Bytes = bytes | memoryview


class Waker:
    """Wakes the thread that polls `fd`. Any thread may ring, also after it was closed."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = RLock()  # a finalizer may ring in the middle of a ring

    def ring(self) -> None:
        with self._lock:
            if self.fd >= 0:
                os.eventfd_write(self.fd, 1)

    def hush(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self.fd)

    def close(self) -> None:
        with self._lock:
            os.close(self.fd)
            self.fd = -1


class Watch:
    """Waits for a bell and for sockets."""

    def __init__(self, waker: Waker) -> None:
        self._poller = zmq.Poller()
        self._poller.register(waker.fd, zmq.POLLIN)

    def add(self, *watched: sockets.Socket) -> None:
        for socket in watched:
            self._poller.register(socket, zmq.POLLIN)

    def remove(self, *watched: sockets.Socket) -> None:
        for socket in watched:
            self._poller.unregister(socket)

    def wait(self, seconds: float | None) -> list[object]:
        """At most so long (None: for ever); the sockets that have something."""
        timeout = None if seconds is None else max(0, math.ceil(1000 * seconds))
        return [source for source, _ in self._poller.poll(timeout)]


def context() -> sockets.Context:
    """For one path's sockets; `term` it when they are all closed."""
    keep_freed_memory()
    return zmq.Context()


def keep_freed_memory() -> None:
    """libzmq takes the memory of each piece from malloc, and glibc gives it back to the kernel at nearly every free:
    the page faults for the next piece then cost as much as its copy (a third of the bandwidth, measured). So this
    process keeps up to 128 MB of what it has freed. Another C library than glibc stays as it is."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 128 << 20)


class BulkServer:
    """Listens for receivers at `address`. With a key, only members of the deployment get in."""

    def __init__(self, context: sockets.Context, address: str, key: Key | None) -> None:
        """Raises NetError: wrong, in use, or of another host without a key."""
        check(address, encrypted=key is not None)
        self.socket = _socket(context, zmq.ROUTER)
        self.socket.set(zmq.ROUTER_MANDATORY, 1)
        self.socket.set(zmq.SNDHWM, PIECES_WAITING)
        self.socket.set(zmq.RCVHWM, REQUESTS_WAITING)
        self.socket.set(zmq.MAXMSGSIZE, REQUEST_BYTES + _CURVE_BYTES)
        if key is not None:
            guard(self.socket, key)
        try:
            self.address = sockets.Bound(self.socket, address, encrypted=key is not None).address
        except NetError:
            self.socket.close(0)
            raise

    def receive(self) -> tuple[bytes, bytes] | None:
        """(peer, message) or None when nothing waits. An empty message stands for what has not one frame."""
        try:
            peer = self.socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None
        message = self.socket.recv(zmq.NOBLOCK) if self.socket.get(zmq.RCVMORE) else b""
        while self.socket.get(zmq.RCVMORE):  # none of it is kept
            self.socket.recv_into(bytearray(), flags=zmq.NOBLOCK)
            message = b""
        return peer, message

    def send(self, peer: bytes, header: bytes, payload: Bytes | None = None) -> bool | None:
        """Never waits; the payload is not copied. False: this peer has not read what it was sent; None: it is gone."""
        try:
            self.socket.send(peer, zmq.NOBLOCK | zmq.SNDMORE)
            if payload is None:
                self.socket.send(header, zmq.NOBLOCK)
            else:
                self.socket.send(header, zmq.NOBLOCK | zmq.SNDMORE)
                self.socket.send(payload, zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return None
        return True

    def close(self) -> None:
        self.socket.close(0)


class BulkLink:
    """A connection to one server. Once it has broken it stays so: another one is made for the next try, so that
    nothing of the old one can come in between."""

    def __init__(self, context: sockets.Context, address: str, key: Key | None) -> None:
        """Raises NetError when `address` is none, or of another host without a key. Nobody there is no error."""
        check(address, encrypted=key is not None)
        self.up = self.broken = self.refused = False
        self.socket = sockets.trying(_socket(context, zmq.DEALER))
        self.socket.set(zmq.SNDHWM, REQUESTS_WAITING)
        self.socket.set(zmq.RCVHWM, PIECES_WAITING)
        self.socket.set(zmq.MAXMSGSIZE, max(PIECE_BYTES, HEADER_BYTES) + _CURVE_BYTES)
        if key is not None:
            introduce(self.socket, key)
        endpoint = f"inproc://bulk-{next(_number)}"
        failed = zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        self.socket.monitor(endpoint, zmq.EVENT_HANDSHAKE_SUCCEEDED | failed)
        self.monitor = context.socket(zmq.PAIR)
        self.monitor.set(zmq.LINGER, 0)
        self.monitor.connect(endpoint)
        try:
            self.socket.connect(address)
        except zmq.ZMQError as error:
            self.close()
            raise NetError(f"{address}: cannot connect ({str(error.strerror).lower()})") from None

    def look(self) -> None:
        """Read the monitor: `up` and `broken` are as of now."""
        while int(self.monitor.get(zmq.EVENTS)) & zmq.POLLIN:
            event = sockets.monitor_event(self.monitor)
            self.refused = self.refused or event == zmq.EVENT_HANDSHAKE_FAILED_AUTH
            self.broken = self.broken or event != zmq.EVENT_HANDSHAKE_SUCCEEDED
            self.up = not self.broken

    def send(self, message: bytes) -> bool:
        """Never waits."""
        for _ in range(2):
            try:
                self.socket.send(message, zmq.NOBLOCK)
                return True
            except zmq.Again:  # a new connection is only looked at now and then, or when asked for
                self.socket.get(zmq.EVENTS)
        return False

    def receive(self) -> bytes | None:
        """The first frame of what comes next; None when nothing waits."""
        try:
            return self.socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None

    @property
    def more(self) -> bool:
        """Whether the message has another frame."""
        return bool(self.socket.get(zmq.RCVMORE))

    def receive_frame(self) -> memoryview:
        """The message's next frame, in the memory that libzmq received it into: nothing is copied. A long frame has it
        to itself until the last view of it falls; short ones may share theirs."""
        return self.socket.recv(zmq.NOBLOCK, copy=False).buffer

    def drop(self) -> int:
        """The rest of the message; how many bytes it has."""
        size = 0
        while self.more:
            size += self.socket.recv_into(bytearray(), flags=zmq.NOBLOCK)
        return size

    def close(self) -> None:
        self.socket.disable_monitor()
        self.monitor.close(0)
        self.socket.close(0)


def _socket(context: sockets.Context, kind: int) -> sockets.Socket:
    socket = sockets.plain(context, kind)
    socket.set(zmq.TCP_MAXRT, UNANSWERED_MS)
    for option, value in _KEEPALIVE.items():
        socket.set(option, value)
    return socket
