"""The clock of every timeout: it hardly counts time in which the process could not listen."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import inf

SLACK_S = 0.1  # a process that wakes up later than this after its planned wait was held up


class Clock:
    """Measures the seconds in which a process could listen for messages. Time in which it was stopped, frozen with its
    container or got no CPU hardly counts: messages that arrived meanwhile are still unread, so nobody must be declared
    silent. Always increases."""

    def __init__(
        self,
        real: Callable[[], float] = time.monotonic,
        slack_s: float = SLACK_S,
        least_s: float = SLACK_S / 10,
        start: float | None = 0.0,
    ) -> None:
        """A gap of more than `slack_s` seconds beyond the planned wait is a hold-up, and counts as `least_s` seconds or
        a little less than the wait. `start`: the time at first; None: that of `real`."""
        self._real, self._slack_s, self._least_s = real, slack_s, least_s
        self._read = self._until = real()
        self._now = self._read if start is None else start

    @classmethod
    def patient(cls, *patience_s: float, real: Callable[[], float] = time.monotonic) -> Clock:
        """The clock of a process whose shortest timeout that ends something is the least of `patience_s`, apart from
        zeros. All work counts, up to a quarter of that at a time: an engine step or a long prompt is no hold-up."""
        slack_s = min(filter(None, patience_s), default=inf) / 4
        return cls(real, slack_s, slack_s, start=None)

    def now(self) -> float:
        """Return the current time in seconds. After a hold-up the clock stops short of the planned wait, so that the
        process listens once more before it decides that nothing arrived."""
        real = self._real()
        if real <= self._until + self._slack_s:
            self._now += real - self._read
        else:
            self._now += max(self._until - self._slack_s - self._read, self._least_s)
        self._read, self._until = real, max(self._until, real)
        return self._now

    def listen(self, seconds: float) -> None:
        """Record that the process now listens for this many seconds; 0 means that it stops listening."""
        self._until = self._read + seconds
