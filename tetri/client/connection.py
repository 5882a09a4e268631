"""The socket of a client. No error of ZeroMQ leaves this module: each is a TetriError of one line."""

from __future__ import annotations

import errno
import os
from typing import Any
from weakref import WeakSet

import zmq

from tetri.client.frames import MAX_RECEIVED, TetriError

LINGER_MS = 200  # on close: long enough to send a last Cancel
TOO_MANY = "close clients that are done, or share one: a client serves many requests at once"
_contexts: dict[int, zmq.Context[Any]] = {}  # by process id: a child may neither use nor end that of its parent
_open: WeakSet[Connection] = WeakSet()
_pid = os.getpid()
_inherited: list[Connection] = []  # kept, so that none is collected here: they are the parent's


def _forked() -> None:
    global _pid
    _pid = os.getpid()
    _inherited.extend(_open)
    _open.clear()


os.register_at_fork(after_in_child=_forked)


class Connection:
    """A socket that is connected to a broker, which may start later. Belongs to the process that created it: in another
    one every method but `close` raises TetriError. All do after `close`."""

    def __init__(self, address: str) -> None:
        """Raises TetriError for an invalid address, and when the process has too many sockets or open files."""
        self._pid, self._address = _pid, address
        try:
            self._socket: Any = _context().socket(zmq.DEALER)
        except zmq.ZMQError as error:
            many = error.errno in (errno.EMFILE, errno.ENFILE)
            raise TetriError(f"no further client: {error.strerror}{f': {TOO_MANY}' if many else ''}") from None
        try:
            self._socket.linger = LINGER_MS
            self._socket.sndhwm = self._socket.rcvhwm = 1000
            self._socket.maxmsgsize = MAX_RECEIVED
            self._socket.connect(address)
        except (zmq.ZMQError, TypeError, ValueError) as error:
            self._socket.close(0)
            why = error.strerror if isinstance(error, zmq.ZMQError) else error
            raise TetriError(f"{address!r} is not a valid broker address: {why}") from None
        _open.add(self)

    @property
    def readable(self) -> int:
        """A file descriptor that becomes readable when messages arrive. It signals a change only: read until `waits` is
        false. Raises TetriError."""
        return int(self._get(zmq.FD))

    def waits(self) -> bool:
        """Whether a message waits. Sending may use up the signal that one has arrived, so ask after it, too. Raises
        TetriError."""
        return bool(self._get(zmq.EVENTS) & zmq.POLLIN)

    def receive(self) -> list[bytes] | None:
        """Return the frames of the next message; None if none waits. Raises TetriError."""
        try:
            return self._usable().recv_multipart(zmq.NOBLOCK)  # type: ignore[no-any-return]
        except zmq.Again:
            return None
        except zmq.ZMQError as error:
            raise self._broken(error) from None

    def send(self, frame: bytes) -> bool:
        """Send a message; return False if the queue is full. Raises TetriError."""
        try:
            self._usable().send(frame, zmq.NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            raise self._broken(error) from None
        return True

    def poll(self, wait_s: float) -> bool:
        """Wait at most so many seconds for a message; return whether one waits. Raises TetriError."""
        try:
            return bool(self._usable().poll(1000 * wait_s + 1))
        except zmq.ZMQError as error:
            raise self._broken(error) from None

    @property
    def here(self) -> bool:
        """Whether this is the process that created the connection."""
        return self._pid == _pid

    def check_process(self) -> None:
        """Raise TetriError in another process than the one that created the connection."""
        if self._pid != _pid:
            raise TetriError(f"this client belongs to process {self._pid}: create one in each process, after the fork")

    def close(self) -> None:
        """Close the connection; what was sent still goes out. Does nothing the second time. In another process the
        connection goes on in its own."""
        _open.discard(self)
        if self.here:
            self._socket.close()

    def __del__(self) -> None:
        if hasattr(self, "_socket"):
            self.close()

    def _usable(self) -> Any:
        if self._pid != _pid:  # here and not only in `check_process`: this is called for every message
            self.check_process()
        return self._socket

    def _get(self, option: int) -> Any:
        try:
            return self._usable().get(option)
        except zmq.ZMQError as error:
            raise self._broken(error) from None

    def _broken(self, error: zmq.ZMQError) -> TetriError:
        if self._socket.closed:
            return TetriError("the client was closed")
        return TetriError(f"the connection to {self._address} is broken: {error.strerror}: create another client")


def flush() -> None:
    """At the end of the process: wait until what closed connections have sent is out, `LINGER_MS` at most."""
    context = _contexts.get(_pid)
    if context is not None and not _open:  # it would wait for open ones
        context.term()


def _context() -> zmq.Context[Any]:
    """The process's context for clients. Not `zmq.Context.instance()`, which the program may end."""
    context = _contexts.get(_pid)
    if context is None or context.closed:
        context = _contexts[_pid] = zmq.Context()
    return context
