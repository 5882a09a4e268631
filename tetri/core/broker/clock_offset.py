"""The clocks of workers, as the broker sees them."""

from __future__ import annotations

from math import inf

WINDOW_S = 2.0  # a clock that has stopped with its process for as long is known again at once, else after two of them


class ClockOffset:
    """How far the broker's clock is ahead of a worker's: what was sent at `at` arrives at `at` plus that, or later. So
    it is the least difference of the messages of the last WINDOW_S to 2 * WINDOW_S seconds. Clocks drift, and they stop
    while their process is stopped (tetri.clock)."""

    __slots__ = ("_best", "_last", "_until")

    def __init__(self) -> None:
        self._last = self._best = inf  # of the window before, and of this one
        self._until = -inf

    def seen(self, at: float, now: float) -> float:
        """A message has come at `now` which says that it was `at` on the worker's clock. Returns the offset."""
        if now >= self._until:
            self._last = self._best if now < self._until + WINDOW_S else inf
            self._best, self._until = inf, now + WINDOW_S
        self._best = min(self._best, now - at)
        return min(self._last, self._best)
