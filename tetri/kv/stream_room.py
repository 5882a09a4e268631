"""The receiver's own memory for what comes over `stream`."""

from __future__ import annotations

import mmap
from contextlib import suppress

_PAGE = 4096


class Room:
    """Lends buffers, and keeps those given back for the next: about `room` bytes of them. The kernel's page faults
    would otherwise cost more than the copy."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._idle: list[memoryview] = []

    def take(self, size: int) -> memoryview:
        """At least `size` bytes, of the smallest buffer that is not far too large."""
        fits = [buffer for buffer in self._idle if size <= len(buffer) <= 2 * max(size, _PAGE)]
        if fits:
            best = min(reversed(fits), key=len)  # of equals the last used: it may still be in a cache
            self._idle = [buffer for buffer in self._idle if buffer is not best]
            return best
        return _touched(-(-max(size, 1) // _PAGE) * _PAGE)

    def give(self, buffer: memoryview) -> None:
        """Those that have lain there longest make room for it."""
        self._idle.append(buffer)
        while sum(map(len, self._idle)) > self._room:
            self._idle.pop(0)


def _touched(size: int) -> memoryview:
    """Memory of which every page is there, large ones where the kernel has some: the copy into it is faster by a
    third."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(memory)
    for at in range(0, size, _PAGE):
        view[at] = 0
    return view
