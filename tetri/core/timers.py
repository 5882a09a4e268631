"""Timers of a core, one due time per key."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from heapq import heappop, heappush
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Timers(Generic[Key]):
    """Due times in seconds by key. Equal times fire in the order in which they were set."""

    def __init__(self) -> None:
        self._due: dict[Key, float] = {}
        self._heap: list[tuple[float, int, Key]] = []
        self._serial = 0
        self._next: float | None = None
        self._known = True  # whether `_next` is the earliest due time

    def set(self, key: Key, when: float) -> None:
        """Set or move the due time of a key."""
        self._due[key] = when
        self._known = False
        self._serial += 1
        heappush(self._heap, (when, self._serial, key))
        if len(self._heap) > 2 * len(self._due) + 64:  # most entries are outdated: their keys were moved or cleared
            latest = {entry[2]: entry for entry in sorted(self._heap) if self._due.get(entry[2]) == entry[0]}
            self._heap = sorted(latest.values())

    def __contains__(self, key: Key) -> bool:
        return key in self._due

    def clear(self, key: Key) -> None:
        """Remove a key, if it is set."""
        if self._due.pop(key, None) is not None:
            self._known = False

    def next(self) -> float | None:
        """Return the earliest due time, or None when no timer is set."""
        if not self._known:
            self._next, self._known = self._earliest(), True
        return self._next

    def _earliest(self) -> float | None:
        heap, latest = self._heap, self._due
        while heap:
            when, _, key = heap[0]
            if latest.get(key) == when:
                return when
            heappop(heap)  # outdated: the key was moved or cleared
        return None

    def due(self, now: float) -> Iterable[Key]:
        """Remove and yield the keys that are due, earliest first, including those set during the iteration."""
        return self._expired(now) if self._heap and self._heap[0][0] <= now else ()

    def _expired(self, now: float) -> Iterator[Key]:
        while self._heap and self._heap[0][0] <= now:
            when, _, key = heappop(self._heap)
            if self._due.get(key) == when:  # else outdated: the key was moved or cleared
                del self._due[key]
                self._known = False
                yield key
