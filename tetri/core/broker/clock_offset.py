"""The clocks of workers, as the broker sees them."""

from __future__ import annotations

from math import inf

DRIFT = 1e-4  # seconds per second by which two clocks may drift apart


class ClockOffset:
    """How far the broker's clock is ahead of a worker's: what was sent at `at` arrives at `at + offset` or later. The
    least difference seen is that of the fastest message, so it is kept, and creeps up since clocks drift."""

    __slots__ = ("offset", "_seen")

    def __init__(self) -> None:
        self.offset, self._seen = inf, 0.0  # inf: nothing has come

    def seen(self, at: float, now: float) -> float:
        """A message has come at `now` which says that it was `at` on the worker's clock. Returns the offset."""
        self.offset = min(self.offset + DRIFT * (now - self._seen), now - at)
        self._seen = now
        return self.offset
