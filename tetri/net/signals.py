"""Ending a process by a signal: the loop's poll returns at once and `running()` turns False."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any


class StopSignals:
    """From its making on, SIGTERM and SIGINT end the loop instead of the process. Main thread only.

    The handler alone would not do: a poll that a signal interrupts is resumed. So the signal also writes into
    `wake_fd` (a hub's), which the poll watches.
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
        """True until a signal came."""
        return self.received is None

    def restore(self) -> None:
        """Put back what was there before. Call it before the hub closes, or a late signal writes into a
        descriptor that may be somebody else's by then."""
        signal.set_wakeup_fd(self._old_fd)
        for number, handler in self._old.items():
            signal.signal(number, handler)
