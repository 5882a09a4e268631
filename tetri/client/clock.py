"""The clock that the client's timeouts use."""

from __future__ import annotations

import time
from collections.abc import Callable

SLACK_S = 0.1  # a client that wakes up later than this after its planned wait was held up


class Clock:
    """Measures the seconds for which the client has listened for messages. Time in which the process was stopped,
    got no CPU, or was busy with the caller's code hardly counts: messages that arrived meanwhile are still unread, so
    the broker must not be declared silent. Starts at 0 and always increases."""

    def __init__(self, real: Callable[[], float] = time.monotonic) -> None:
        self._real = real
        self._now = 0.0
        self._read = self._until = real()

    def now(self) -> float:
        """Return the current time in seconds. After a hold-up the clock stops `SLACK_S` short of the planned wait, so
        that the client listens once more before it decides that nothing arrived."""
        real = self._real()
        if real <= self._until + SLACK_S:
            self._now += real - self._read
        else:
            self._now += max(self._until - SLACK_S - self._read, SLACK_S / 10)
        self._read, self._until = real, max(self._until, real)
        return self._now

    def listen(self, seconds: float) -> None:
        """Record that the client now listens for this many seconds; 0 means that it stops listening."""
        self._until = self._read + seconds
