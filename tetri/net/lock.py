"""A lock file: one process at a time, and the next one is told which process it is."""

from __future__ import annotations

import fcntl
import os
from types import TracebackType
from typing import Self

from tetri.net.errors import NetError


class Lock:
    """A held lock. It ends with `release()`, with the process, or at the end of a `with`."""

    def __init__(self, path: str, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    def release(self) -> None:
        """Let the next one in. The file stays: removing it would let two processes hold "the same" lock."""
        if self._descriptor >= 0:
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def hold(path: str | os.PathLike[str]) -> Lock:
    """Take the lock at `path` (made when missing) for this process; raises NetError that names who holds it.

    The kernel ends the lock with the process, however that dies; only the flock counts, the number in the
    file is for people. Children that are exec'ed do not inherit it, forked ones would.
    """
    name = os.fspath(path)
    try:
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise NetError(f"{name}: cannot open the lock file ({str(error.strerror).lower()})") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
        os.close(descriptor)
        raise NetError(f"{name}: in use by process {holder}") from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return Lock(name, descriptor)
