"""Virtual time: a heap of what happens when. Equal times happen in the order in which they were set."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any


class Kernel:
    """`now` is in seconds. `happened` counts the events."""

    __slots__ = ("now", "happened", "_heap", "_serial", "_stopped")

    def __init__(self, start: float = 0.0) -> None:
        self.now = start
        self.happened = 0
        self._heap: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._serial = 0
        self._stopped = False

    def at(self, when: float, what: Callable[[Any], None], argument: Any = None) -> None:
        """Call `what(argument)` at `when`, which must not lie in the past."""
        if when < self.now:
            raise ValueError(f"{when} s lies before {self.now} s")
        self._serial += 1
        heappush(self._heap, (when, self._serial, what, argument))

    @property
    def more_now(self) -> bool:
        """Whether anything else happens at this very time."""
        return bool(self._heap) and self._heap[0][0] <= self.now

    def stop(self) -> None:
        """`run` returns before the next event."""
        self._stopped = True

    def run(self) -> None:
        """Until nothing is left or `stop` was called."""
        heap, happened = self._heap, 0
        self._stopped = False
        while heap and not self._stopped:
            self.now, _, what, argument = heappop(heap)
            happened += 1
            what(argument)
        self.happened += happened
