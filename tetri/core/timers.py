"""Timers of a core: when to look at what. One due time per key; setting a key again moves it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
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
        heap, latest = self._heap, self._due
        while heap:
            when, _, key = heap[0]
            if latest.get(key) == when:
                return when
            heappop(heap)  # was moved or cleared
        return None

    def due(self, now: float) -> Iterable[Key]:
        """Take out the keys that are due, earliest first; also those set meanwhile."""
        return self._expired(now) if self._heap and self._heap[0][0] <= now else ()

    def _expired(self, now: float) -> Iterator[Key]:
        while (when := self.next()) is not None and when <= now:
            key = heappop(self._heap)[2]
            del self._due[key]
            yield key
