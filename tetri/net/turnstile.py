"""Lets connections to a Unix socket into libzmq only while there are descriptors for them.

libzmq accepts on its own thread, and ends the process when that fails for want of a descriptor ("Too many open files",
libzmq #1306). Closing its listener in time is no remedy: the burst is faster, and the connections would close with it.
So libzmq never sees the listener that clients reach. They wait in the queue of a socket of ours. When there is
space, a new socket takes its place at the path, and libzmq accepts from the old one, which nobody can reach any more:
at most WAITING connections, whatever happens meanwhile.

libzmq keeps one descriptor number for good. Its epoll watches the file that was behind the number at first, the
*trigger*, but `accept` uses the file that is behind it now. `_admit` puts the old socket there and pulls the trigger by
a connection to it. The trigger has no path: a descriptor leads to its socket.

A cleaner of temporary files or a logout may remove the path. Then a new socket is put there; open connections stay.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from logging import Logger
from threading import Thread

import zmq

from tetri.net import descriptors
from tetri.net.address import NEXT, refuse_live_owner

WAITING = 16  # connections that wait in a queue, and then enter together
_OWN = 4  # descriptors that one turn needs besides
START_S = 5.0  # most time that libzmq's thread takes to watch a new socket
TURN_S = 0.02  # wait this long for libzmq's thread, which needs far less unless the machine is busy
_BUSY_S, _FULL_S = 0.01, 0.1  # until the next try while libzmq still accepts, or while there is no space
_QUIET_S = 10.0  # between two warnings that there is no space
CHECK_S = 1.0  # between two looks whether the path is still there


class Turnstile:
    """The way into `zmq_socket` at `path`. Its own thread lets connections in: they wait for no step."""

    def __init__(self, zmq_socket: zmq.Socket[bytes], path: str, may_enter: Callable[[], bool], log: Logger) -> None:
        """`may_enter`, which the thread calls: whether WAITING more connections fit. Raises OSError, ZMQError
        and NetError."""
        self.path, self._may_enter, self._log = path, may_enter, log
        refuse_live_owner(path + NEXT)
        self._folder_owner = os.stat(os.path.dirname(path)).st_uid
        self._mode: int | None = None  # of the file at the path; None: as the umask has it
        self._pulling: socket.socket | None = None
        self._entering: socket.socket | None = None
        self._warned = -_QUIET_S
        self._trigger = _listening(path + NEXT)
        self._way = os.open(path + NEXT, os.O_PATH | os.O_CLOEXEC)
        os.unlink(path + NEXT)
        self._number = os.dup(self._trigger.fileno())  # libzmq closes it
        zmq_socket.set(zmq.USE_FD, self._number)
        try:
            zmq_socket.bind(f"ipc://{path}")
            self._watched()
            self._file = self._at_path()
        except (OSError, zmq.ZMQError):
            self._trigger.close()
            os.close(self._way)
            raise
        self._stop = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = Thread(target=self._run, name=f"turnstile {path}", daemon=True)
        self._thread.start()

    def _watched(self) -> None:
        """Wait until libzmq's thread watches the trigger: it accepts a connection to it. Then put a socket
        that nobody reaches behind the number, so that pulling alone lets nobody in."""
        with self._pull():
            if not _empty(self._trigger, START_S):
                raise TimeoutError(errno.ETIMEDOUT, "libzmq does not start to listen")
        with _listening(self.path + NEXT) as nobody:
            os.dup2(nobody.fileno(), self._number, inheritable=False)
        os.unlink(self.path + NEXT)

    def _pull(self) -> socket.socket:
        """A connection to the trigger: libzmq accepts from what is behind the number, for as long as nobody accepts
        this connection."""
        pulling = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            pulling.connect(f"/proc/self/fd/{self._way}")
        except OSError:
            pulling.close()
            raise
        return pulling

    def _run(self) -> None:
        while not self._stopped(CHECK_S, self._file):
            if _empty(self._file, 0):
                self._keep()
                continue
            while not self._admitted():
                if self._stopped(_BUSY_S if self._entering is not None else _FULL_S):
                    return

    def _stopped(self, seconds: float, *others: socket.socket) -> bool:
        """Wait for `close`, or for somebody at the sockets `others`. True: it was `close`."""
        poll = select.poll()
        for descriptor in (self._stop, *(other.fileno() for other in others)):
            poll.register(descriptor, select.POLLIN)
        return any(descriptor == self._stop for descriptor, _ in poll.poll(1000 * seconds))

    def _keep(self) -> None:
        """Put a new socket at the path if its file was removed. While the folder is gone too, try again later."""
        with suppress(FileNotFoundError):
            self._mode = stat.S_IMODE(os.stat(self.path).st_mode)
            return
        try:
            gone, self._file = self._file, self._at_path()
            gone.close()
            self._log.warning("ipc://%s: the file was removed: listening at a new one", self.path)
        except FileNotFoundError:
            pass
        except OSError as error:
            self._warn(f"the file was removed ({str(error.strerror).lower()})")

    def _admitted(self) -> bool:
        """Let those in who wait. False: they wait on, and the log says why."""
        try:
            if not self._entered():
                return False
            if self._may_enter():
                return self._admit()
            why = "no room for more connections: new ones wait"
        except OSError as error:
            why = f"cannot let connections in ({str(error.strerror).lower()})"
        self._warn(f"{why} ({descriptors.used()} files are open)")
        return False

    def _warn(self, why: str) -> None:
        if time.monotonic() - self._warned > _QUIET_S:
            self._warned = time.monotonic()
            self._log.warning("ipc://%s: %s", self.path, why)

    def _admit(self) -> bool:
        if _replaced(self.path, self._inode):
            raise FileExistsError(errno.EEXIST, "another process has taken the path over")
        try:
            self._pulling = self._pull()
            ready = self._at_path()
        except OSError:
            self._still()
            raise
        self._entering, self._file = self._file, ready
        os.dup2(self._entering.fileno(), self._number, inheritable=False)
        return self._entered()

    def _entered(self) -> bool:
        """Release the trigger once libzmq has accepted all. False: it still does, after a short while."""
        if self._entering is not None and not _empty(self._entering, TURN_S):
            return False
        self._still()
        return True

    def _still(self) -> None:
        """Release the trigger, which libzmq sees for as long as somebody waits in its queue."""
        with suppress(BlockingIOError):
            while self._pulling is not None:
                self._trigger.accept()[0].close()
        for done in (self._pulling, self._entering):
            if done is not None:
                done.close()
        self._pulling = self._entering = None

    def _at_path(self) -> socket.socket:
        """A new socket at the path, in place of the one before, with the same permissions."""
        if os.stat(os.path.dirname(self.path)).st_uid != self._folder_owner:
            raise PermissionError(errno.EPERM, "the folder now belongs to another user")
        made = _listening(self.path + NEXT)
        with suppress(FileNotFoundError):  # it is the first, or was removed
            self._mode = stat.S_IMODE(os.stat(self.path).st_mode)
        if self._mode is not None:
            os.chmod(self.path + NEXT, self._mode)
        self._inode = os.stat(self.path + NEXT).st_ino
        os.rename(self.path + NEXT, self.path)
        return made

    def close(self) -> None:
        """Let nobody in any more, and remove the files, unless another process has replaced them. Call it before the
        socket of libzmq is closed: that removes from its epoll what the number was at first."""
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        self._still()
        os.dup2(self._trigger.fileno(), self._number, inheritable=False)
        self._trigger.close()
        self._file.close()
        os.close(self._way)
        os.close(self._stop)
        if not _replaced(self.path, self._inode):
            with suppress(FileNotFoundError):
                os.unlink(self.path)


def files_left() -> bool:
    """Whether there are descriptors for one turn."""
    return descriptors.left() >= WAITING + _OWN


def _replaced(path: str, inode: int) -> bool:
    """Whether another process has put its own file at the path."""
    with suppress(FileNotFoundError):
        return os.stat(path).st_ino != inode
    return False


def _empty(listening: socket.socket, seconds: float) -> bool:
    """Wait until nobody waits in this queue; False: somebody still does after so many seconds."""
    poll, until = select.poll(), time.monotonic() + seconds
    poll.register(listening, select.POLLIN)
    while poll.poll(0):
        if time.monotonic() > until:
            return False
        time.sleep(0.0001)
    return True


def _listening(path: str) -> socket.socket:
    """A listening socket at a new file. It never blocks: libzmq may find that nobody waits any more."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.setblocking(False)
        with suppress(FileNotFoundError):
            os.unlink(path)
        made.bind(path)
        made.listen(WAITING - 1)
    except OSError:
        made.close()
        raise
    return made
