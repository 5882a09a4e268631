"""Lock files: one process at a time holds a lock; the error for the next one names the holder."""

from __future__ import annotations

import fcntl
import os
from typing import Self

from tetri.net.errors import NetError


class Lock:
    """A held lock. It ends with `release()`, with the process, or at the end of a `with`."""

    def __init__(self, path: str, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    def release(self) -> None:
        """Release the lock. The file stays: removing it would let two processes hold the same lock."""
        if self._descriptor >= 0:
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def hold(path: str | os.PathLike[str]) -> Lock:
    """Lock the file `path` (created if missing) for this process. Raises NetError that names the holder.

    The kernel releases the lock when the process ends in any way. Only the flock counts; the pid in the file is for
    people. Executed children do not inherit the lock; forked ones do.
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
