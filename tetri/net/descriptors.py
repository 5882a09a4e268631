"""File descriptors of this process: their limit, and how many are left.

libzmq ends the process when an `accept` on a Unix socket finds no descriptor left, so net/turnstile.py lets
connections in only while there are enough.
"""

from __future__ import annotations

import os
import resource

# Descriptors that connections leave free: for new links to peers, files, and libzmq's own wakers.
RESERVE = 32
_MOST = 1 << 20  # some programs visit every number below the limit, which may be a thousand million


def hard_limit() -> int:
    """The limit that this process may raise its own to."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if hard == resource.RLIM_INFINITY else min(hard, _MOST)


def limit() -> int:
    """The limit of this process."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if soft == resource.RLIM_INFINITY else soft


def raise_limit() -> int:
    """Raise the limit of this process as far as it may, and return it."""
    if limit() < hard_limit():
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit(), resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    return limit()


def used() -> int:
    """How many descriptors are open."""
    return os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd"))  # 0 before Linux 6.2


def left() -> int:
    """How many more can be opened, without those of the reserve; below 0 when the reserve is in use."""
    return limit() - used() - RESERVE
