"""Ends a process on a signal: the loop's poll returns at once and `running()` becomes False."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any


class StopSignals:
    """Makes SIGTERM and SIGINT end the loop instead of the process. Main thread only.

    A handler alone is not enough, because Python resumes a poll that a signal interrupts. So the signal also writes to
    `wake_fd` (of a hub), which the poll watches.
    """

    def __init__(self, wake_fd: int) -> None:
        self.received: signal.Signals | None = None
        self._old_fd = signal.set_wakeup_fd(wake_fd, warn_on_full_buffer=False)
        self._old: dict[signal.Signals, Callable[[int, FrameType | None], Any] | int | None] = {
            number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)
        }

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)

    def running(self) -> bool:
        """True until a signal arrives."""
        return self.received is None

    def restore(self) -> None:
        """Restore the earlier handlers. Call it before the hub closes: a late signal would write to a descriptor that
        may have been reused."""
        signal.set_wakeup_fd(self._old_fd)
        for number, handler in self._old.items():
            signal.signal(number, handler)
