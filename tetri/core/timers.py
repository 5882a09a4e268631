"""Timers of a core: when to look at what. One due time per key; setting a key again moves it."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from heapq import heappop, heappush
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Timers(Generic[Key]):
    def __init__(self) -> None:
        self._due: dict[Key, float] = {}
        self._heap: list[tuple[float, int, Key]] = []
        self._serial = 0  # equal times fire in the order in which they were set

    def set(self, key: Key, when: float) -> None:
        self._due[key] = when
        self._serial += 1
        heappush(self._heap, (when, self._serial, key))
        if len(self._heap) > 2 * len(self._due) + 64:  # mostly what was moved or cleared
            latest = {entry[2]: entry for entry in sorted(self._heap) if self._due.get(entry[2]) == entry[0]}
            self._heap = sorted(latest.values())

    def __contains__(self, key: Key) -> bool:
        return key in self._due

    def clear(self, key: Key) -> None:
        self._due.pop(key, None)

    def next(self) -> float | None:
        """The earliest due time, None when nothing is set."""
        while self._heap and self._due.get(self._heap[0][2]) != self._heap[0][0]:
            heappop(self._heap)  # was moved or cleared
        return self._heap[0][0] if self._heap else None

    def due(self, now: float) -> Iterator[Key]:
        """Take out the keys that are due, earliest first."""
        while (when := self.next()) is not None and when <= now:
            key = heappop(self._heap)[2]
            del self._due[key]
            yield key
