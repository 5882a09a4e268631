"""The event loop of virtual time. Events of the same time run in the order in which they were scheduled."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from heapq import heappop, heappush
from typing import Any


class Kernel:
    """A heap of events. `now` is the virtual time in seconds; `happened` counts the events that have run."""

    __slots__ = ("now", "happened", "_heap", "_serial", "_stopped")

    def __init__(self, start: float = 0.0) -> None:
        self.now = start
        self.happened = 0
        self._heap: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._serial = 0
        self._stopped = False

    def at(self, when: float, what: Callable[[Any], None], argument: Any = None) -> None:
        """Schedule `what(argument)` at `when`, in seconds. Raises ValueError if that is in the past."""
        if when < self.now:
            raise ValueError(f"{when} s is before the current time, {self.now} s")
        self._serial += 1
        heappush(self._heap, (when, self._serial, what, argument))

    @property
    def more_now(self) -> bool:
        """Whether more events are due at the current time."""
        return bool(self._heap) and self._heap[0][0] <= self.now

    def stop(self) -> None:
        """Make `run` return before the next event."""
        self._stopped = True

    def run(self) -> None:
        """Run events until none is left or `stop` is called."""
        heap, happened = self._heap, 0
        self._stopped = False
        while heap and not self._stopped:
            self.now, _, what, argument = heappop(heap)
            happened += 1
            what(argument)
        self.happened += happened


@contextmanager
def uncollected() -> Iterator[None]:
    """Switch the garbage collector off for a run. It makes millions of objects and hardly any cycles of them (with
    faults, a dozen objects a request), and the collector would take a tenth of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
