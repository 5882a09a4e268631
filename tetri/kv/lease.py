"""Who still has a segment open: a reader holds a lease on the segment's file as long as it has the memory behind it
mapped. A lease falls with its holder's process.

CUDA leaves undefined what happens when memory is given back that another process has open. So its owner first asks
whether all leases have fallen.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time

from tetri.kv.base import KVLost

_FLOCK = "hhqqi4x"  # struct flock: type, whence, start, length (0: all), pid
_STEP_S = 0.005


def lease(path: str) -> int:
    """A lease on a segment, as an open descriptor: closing it gives it back. Raises KVLost: the segment is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (OSError, ValueError):
        raise KVLost(f"{path[-160:]!r} is gone") from None
    # Once its owner has asked for the leases no new one is given, and afterwards the file has no name any more.
    if _lock(descriptor, fcntl.F_RDLCK) and os.fstat(descriptor).st_nlink:
        return descriptor
    os.close(descriptor)
    raise KVLost(f"{path[-160:]!r} was closed by its owner")


def wanted_back(descriptor: int) -> bool:
    """By the holder of a lease: whether the owner has closed the segment, or has ended. Its file has no name then, or
    the owner no lock on it (segment.py)."""
    if not os.fstat(descriptor).st_nlink:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return True


def all_fallen(descriptor: int, patience_s: float) -> bool:
    """By the owner, whose file has no name any more: whether no lease is left, waiting so long for the last."""
    deadline = time.monotonic() + patience_s
    while not _lock(descriptor, fcntl.F_WRLCK):
        if time.monotonic() > deadline:
            return False
        time.sleep(_STEP_S)
    return True


def _lock(descriptor: int, kind: int) -> bool:
    """A lock of the open file, not of the process, so that two stores of one process see each other's. Those of flock
    are others."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, 0, 0, 0))
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        return False
    return True
