"""Segments whose file was unlinked while the owner runs: systemd-logind does so when a user without lingering logs out
(RemoveIPC), or someone clears /dev/shm. The kernel gives such a file no name again, but its memory lives as long as the
owner has it open, and processes of the same user and PID namespace can open it through the owner's /proc/PID/fd."""

from __future__ import annotations

import os
from contextlib import suppress

from tetri.private import own_file

UNLINKED = "segment_unlinked"  # counter in a worker's heartbeats: 1 when its segment has lost its name
_DELETED = " (deleted)"  # the kernel's mark


def unlinked(descriptor: int) -> bool:
    """Whether an open file has lost its name."""
    return not os.fstat(descriptor).st_nlink


def unnamed(pid: int) -> dict[str, str]:
    """The unlinked files that a process has open: path that the file had -> path by which it can be opened. Empty when
    the process is gone or cannot be looked at."""
    found = {}
    with suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with suppress(OSError):  # closed meanwhile
                had = os.readlink(entry.path)
                if had.endswith(_DELETED):
                    found[had.removesuffix(_DELETED)] = entry.path
    return found


def reopen(pid: int, name: str) -> int | None:
    """Open the unlinked file of this name and this user, read-only, that a process has open; returns the descriptor, or
    None. The folder may differ: the process may have it mounted elsewhere."""
    for had, path in unnamed(pid).items():
        if os.path.basename(had) == name:
            with suppress(OSError):
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                now = os.readlink(f"/proc/self/fd/{descriptor}")
                if os.path.basename(now) == name + _DELETED and own_file(os.fstat(descriptor)):
                    return descriptor
                os.close(descriptor)  # the number was given to another file meanwhile
    return None
