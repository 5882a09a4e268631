"""Moves the weights of a loaded model to huge pages. A core remembers the places of some thousand pages of 4 KiB, which
is less than the weights that a step reads; so each step looks most of them up again."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from pathlib import Path

LEAST_BYTES = 4 << 20
MADV_COLLAPSE = 25  # Linux 6.1; whatever the setting of transparent huge pages


def collapse(smaps: Path = Path("/proc/self/smaps")) -> int:
    """Move the large memory of this process that is in use to huge pages; returns the bytes of what was moved. Where
    the kernel does not do that, nothing changes."""
    madvise = ctypes.CDLL(None).madvise
    moved = 0
    for start, stop in [*in_use(smaps.read_text())]:
        if madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), MADV_COLLAPSE) == 0:
            moved += stop - start
    return moved


def in_use(smaps: str) -> Iterator[tuple[int, int]]:
    """The address ranges of large private memory, not of files, of which three quarters or more are in use: what is
    only reserved would take memory."""
    found = re.findall(r"^(\w+)-(\w+) rw-p \w+ 00:00 0 *(?:\[heap\])?\n(?:.*\n)*?Rss: *(\d+) kB", smaps, re.MULTILINE)
    for first, last, resident in found:
        start, stop = int(first, 16), int(last, 16)
        if stop - start >= LEAST_BYTES and 1024 * int(resident) >= 0.75 * (stop - start):
            yield start, stop
