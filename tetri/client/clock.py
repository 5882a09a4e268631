"""The clock by which a client judges silence."""

from __future__ import annotations

import time
from collections.abc import Callable

SLACK_S = 0.1  # later than this after the time for which it meant to listen, a client was held up


class Clock:
    """Seconds for which the client has listened. Of the time in which its process was stopped, got no CPU, or was
    kept busy by its caller, next to nothing counts: what the broker said meanwhile is still to be read, so nobody
    was silent. Starts at 0, never goes back, and never stands still."""

    def __init__(self, real: Callable[[], float] = time.monotonic) -> None:
        self._real = real
        self._now = 0.0
        self._read = self._until = real()

    def now(self) -> float:
        """After a hold-up a little less than what the client meant to listen for: so it listens once more, for
        `SLACK_S`, before it finds that nothing came."""
        real = self._real()
        if real <= self._until + SLACK_S:
            self._now += real - self._read
        else:
            self._now += max(self._until - SLACK_S - self._read, SLACK_S / 10)
        self._read, self._until = real, max(self._until, real)
        return self._now

    def listen(self, seconds: float) -> None:
        """From now on the client takes what comes, for so long unless it says otherwise; 0: not any more."""
        self._until = self._read + seconds
