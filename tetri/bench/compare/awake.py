"""Keep the machine awake while something is measured, and note when it stood still.

On some virtual machines, while all CPUs are busy, runnable threads wait seconds for a CPU. A real-time thread on each
CPU that wakes every few milliseconds prevents that; it takes less than 1 % of a CPU. Only root, or a process with
CAP_SYS_NICE, may have one. In any case the threads notice when they wake up late: what was measured meanwhile says
nothing about what was measured.
"""

from __future__ import annotations

import os
import threading
import time
from types import TracebackType

PERIOD_S = 0.005  # of real-time threads
IDLE_PERIOD_S = 0.05  # of others, which only watch
LATE_S = 0.3


class Awake:
    """Context manager. `real_time`: whether its threads keep the machine awake, known once it is entered. `wanted`
    False: they only watch."""

    def __init__(self, wanted: bool = True) -> None:
        self.real_time = wanted
        self._stopped = threading.Event()
        self._standstills: list[float] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Awake:
        cpus = sorted(os.sched_getaffinity(0))
        started = threading.Barrier(len(cpus) + 1)
        self._threads = [
            threading.Thread(target=self._tick, args=(cpu, started), name=f"awake {cpu}", daemon=True) for cpu in cpus
        ]
        for thread in self._threads:
            thread.start()
        started.wait()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def standstills(self) -> list[float]:
        """By how many seconds a thread woke up late since the last call, each time that it was more than LATE_S."""
        found, self._standstills = self._standstills, []
        return found

    def _tick(self, cpu: int, started: threading.Barrier) -> None:
        own = threading.get_native_id()
        os.sched_setaffinity(own, {cpu})
        if self.real_time:
            try:
                os.sched_setscheduler(own, os.SCHED_FIFO, os.sched_param(1))
            except PermissionError:
                self.real_time = False
        period, last = PERIOD_S if self.real_time else IDLE_PERIOD_S, time.monotonic()
        started.wait()
        while not self._stopped.is_set():
            time.sleep(period)
            now = time.monotonic()
            if now - last - period > LATE_S:
                self._standstills.append(now - last - period)
            last = now
