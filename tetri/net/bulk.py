"""The sockets of the KV path `stream`: a ROUTER that serves a slab, and a DEALER to each server that is read.

A message to a server has one frame. A message from a server has one frame (wire/bulk.py), and a Piece has a second
frame with the bytes. Each socket belongs to one thread; other threads wake that thread with a `Waker`.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from threading import RLock

import zmq

from tetri.net import sockets
from tetri.net.address import check
from tetri.net.connection import Connection
from tetri.net.errors import NetError
from tetri.net.keys import Key, ZapHandler, guard, introduce
from tetri.wire.bulk import HEADER_BYTES, PIECE_BYTES, REQUEST_BYTES

PIECES_WAITING = 4096  # queued for one receiver; its credit ends before that
REQUESTS_WAITING = 512  # queued from one receiver; it has at most half as many fetches at once
UNANSWERED_MS = 10_000  # a connection ends when the other host acknowledges no bytes for this long
_TCP: sockets.Options = {
    zmq.TCP_MAXRT: UNANSWERED_MS,
    zmq.TCP_KEEPALIVE: 1,  # the next are seconds, seconds, probes
    zmq.TCP_KEEPALIVE_IDLE: 30,
    zmq.TCP_KEEPALIVE_INTVL: 10,
    zmq.TCP_KEEPALIVE_CNT: 3,
}
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_CURVE_BYTES = 64  # encryption makes frames longer by this much at most, and MAXMSGSIZE applies to encrypted frames
Bytes = bytes | memoryview


class Waker:
    """Wakes the thread that polls `fd`."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = RLock()  # re-entrant: a finalizer may call `ring` during a `ring`

    def ring(self) -> None:
        """Wake the thread. Callable from any thread, also after `close`."""
        with self._lock:
            if self.fd >= 0:
                os.eventfd_write(self.fd, 1)

    def hush(self) -> None:
        """Reset: forget all earlier `ring` calls."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.fd)

    def close(self) -> None:
        with self._lock:
            os.close(self.fd)
            self.fd = -1


class Watch:
    """Waits for a waker and for sockets."""

    def __init__(self, waker: Waker) -> None:
        self._poller = zmq.Poller()
        self._poller.register(waker.fd, zmq.POLLIN)

    def add(self, *watched: sockets.Socket) -> None:
        """Watch these sockets for messages."""
        for socket in watched:
            self._poller.register(socket, zmq.POLLIN)

    def remove(self, *watched: sockets.Socket) -> None:
        """Stop watching these sockets."""
        for socket in watched:
            self._poller.unregister(socket)

    def wait(self, seconds: float | None) -> list[object]:
        """Wait for at most `seconds` (None: no limit). Returns the sockets that are readable."""
        return [source for source, _ in self._poller.poll(sockets.milliseconds(seconds))]


def context() -> sockets.Context:
    """A ZeroMQ context for the sockets of one path. Call `term` after closing them all."""
    keep_freed_memory()
    return zmq.Context()


def keep_freed_memory() -> None:
    """Make glibc keep up to 128 MB of freed memory. libzmq allocates each piece with malloc, and by default glibc
    returns that memory to the kernel at nearly every free; the page faults of the next piece then cost a third of the
    bandwidth (measured). Does nothing for another C library."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 128 << 20)


class BulkServer:
    """Listens for receivers at `address`. Only members of the deployment, which have its key, can connect."""

    def __init__(self, context: sockets.Context, address: str, key: Key) -> None:
        """Raises NetError when the address is invalid or in use."""
        check(address, encrypted=True)
        self._zap_handler = ZapHandler(context, key)
        waiting: sockets.Options = {zmq.SNDHWM: PIECES_WAITING, zmq.RCVHWM: REQUESTS_WAITING}
        limits: sockets.Options = {**waiting, zmq.MAXMSGSIZE: REQUEST_BYTES + _CURVE_BYTES}
        self.socket = sockets.plain(context, zmq.ROUTER, {**_TCP, **limits, zmq.ROUTER_MANDATORY: 1})
        guard(self.socket, key)
        try:
            self.address = sockets.Bound(self.socket, address, encrypted=True).address
        except NetError:
            self.close()
            raise

    @property
    def watched(self) -> list[sockets.Socket]:
        """The sockets to watch."""
        return [self.socket, self._zap_handler.socket]

    @property
    def refused(self) -> int:
        """How many handshakes were refused."""
        return self._zap_handler.refused

    def admit(self) -> None:
        """Answer all waiting handshakes."""
        self._zap_handler.answer()

    def receive(self) -> tuple[bytes, bytes] | None:
        """The next (peer, message), None when there is none. A message that has not exactly one frame is returned as
        b""."""
        try:
            peer = self.socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None
        message = self.socket.recv(zmq.NOBLOCK) if self.socket.get(zmq.RCVMORE) else b""
        while self.socket.get(zmq.RCVMORE):  # discarded
            self.socket.recv_into(bytearray(), flags=zmq.NOBLOCK)
            message = b""
        return peer, message

    def send(self, peer: bytes, header: bytes, payload: Bytes | None = None) -> bool | None:
        """Send without waiting and without copying the payload. False: the peer's queue is full; None: the peer is
        gone."""
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
        """Close the sockets and drop their queues."""
        for socket in self.watched:
            socket.close(0)


class BulkLink(Connection):
    """A connection to one server. `up`, `broken`, `refused` (wrong key): its state at the last `look`. A broken link
    never recovers: the caller opens a new one, so that no message of the old connection can arrive on it."""

    def __init__(self, context: sockets.Context, address: str, key: Key) -> None:
        """Raises NetError when the address is invalid. An address where no process listens is no error."""
        check(address, encrypted=True)
        self.up = self.broken = self.refused = False
        waiting: sockets.Options = {zmq.SNDHWM: REQUESTS_WAITING, zmq.RCVHWM: PIECES_WAITING}
        limits: sockets.Options = {**waiting, zmq.MAXMSGSIZE: max(PIECE_BYTES, HEADER_BYTES) + _CURVE_BYTES}
        socket = sockets.plain(context, zmq.DEALER, {**sockets.TRYING, **_TCP, **limits})
        introduce(socket, key)
        failed = zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        super().__init__(context, socket, address, zmq.EVENT_HANDSHAKE_SUCCEEDED | failed)

    def look(self) -> None:
        """Read the monitor and update `up`, `broken` and `refused`."""
        for event in self.reported():
            self.refused = self.refused or event == zmq.EVENT_HANDSHAKE_FAILED_AUTH
            self.broken = self.broken or event != zmq.EVENT_HANDSHAKE_SUCCEEDED
            self.up = not self.broken

    def receive(self) -> bytes | None:
        """The first frame of the next message, None when there is none."""
        try:
            return self.socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None

    @property
    def more(self) -> bool:
        """Whether the message has another frame."""
        return bool(self.socket.get(zmq.RCVMORE))

    def receive_frame(self) -> memoryview:
        """The message's next frame, without a copy, in libzmq's memory. A long frame owns its memory until the last
        view is gone; short frames may share a buffer."""
        return self.socket.recv(zmq.NOBLOCK, copy=False).buffer

    def drop(self) -> int:
        """Discard the rest of the message; returns its size in bytes."""
        size = 0
        while self.more:
            size += self.socket.recv_into(bytearray(), flags=zmq.NOBLOCK)
        return size
