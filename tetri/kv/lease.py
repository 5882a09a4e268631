"""Leases on segments: a reader holds a lease on the segment's file while it has the slab's GPU memory open. The kernel
ends the lease when the reader's process ends.

CUDA does not define what happens when the owner frees memory that another process has open. So the owner first waits
until no lease is left.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time

from tetri.kv.base import KVLost
from tetri.kv.segment import closed, opened

_FLOCK = "hhqqi4x"  # struct flock: type, whence, start, length (0: all), pid
_STEP_S = 0.005


def lease(path: str, owner: int) -> int:
    """Acquire a lease on the segment file `path`, also if it has lost its name while the process `owner` runs. Returns
    a descriptor; closing it ends the lease. Raises KVLost when the segment is gone."""
    descriptor = opened(*os.path.split(path), owner)
    # The owner marks the file as closed and then locks it (all_fallen): from then on no new lease can be acquired.
    if _lock(descriptor, fcntl.F_RDLCK) and not closed(descriptor):
        return descriptor
    os.close(descriptor)
    raise KVLost(f"{path[-160:]!r} was closed by its owner")


def wanted_back(descriptor: int) -> bool:
    """For the holder of a lease: whether the owner has closed the segment or has ended. The file then says so, or the
    owner's lock on it is gone (segment.py)."""
    return closed(descriptor) or not owned(descriptor)


def owned(descriptor: int) -> bool:
    """Whether the segment's owner holds its lock on the file, so lives. Tests with a shared lock, so that several
    processes can look at once."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return False


def all_fallen(descriptor: int, patience_s: float) -> bool:
    """For the owner, after it has closed the file: wait at most `patience_s` seconds until no lease is left; whether
    that is so."""
    deadline = time.monotonic() + patience_s
    while not _lock(descriptor, fcntl.F_WRLCK):
        if time.monotonic() > deadline:
            return False
        time.sleep(_STEP_S)
    return True


def _lock(descriptor: int, kind: int) -> bool:
    """Try to lock the open file description, not the process, so that two stores of one process see each other's
    locks. These locks are independent of flock's."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, 0, 0, 0))
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        return False
    return True
