"""Keep the machine awake while something is measured, and note when it stood still.

On some virtual machines, while all CPUs are busy, runnable threads wait seconds for a CPU. A real-time thread on each
CPU that wakes every few milliseconds prevents that; it takes less than 1 % of a CPU. Only root, or a process with
CAP_SYS_NICE, may have one. It has a process of its own: in this one it would wait for Python's lock, which a thread may
hold that gets no CPU. In any case the threads notice when they wake up late: what was measured meanwhile says nothing
about what was measured.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from types import TracebackType

PERIOD_S = 0.005  # of real-time threads
IDLE_PERIOD_S = 0.05  # of others, which only watch
LATE_S = 0.3
REAL_TIME, WATCHING = "real-time", "watching"


class Awake:
    """Context manager. `real_time`: whether its processes keep the machine awake, known once it is entered. `wanted`
    False: they only watch."""

    def __init__(self, wanted: bool = True) -> None:
        self.real_time = wanted
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Awake:
        kind = REAL_TIME if self.real_time else WATCHING
        for cpu in sorted(os.sched_getaffinity(0)):
            command = [sys.executable, "-P", "-m", __name__, str(cpu), kind]
            self._processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE))
        for process in self._processes:
            assert process.stdout is not None
            self.real_time = process.stdout.readline().decode().strip() == REAL_TIME and self.real_time
            os.set_blocking(process.stdout.fileno(), False)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for process in self._processes:
            process.kill()
            with process:  # closes its pipes, and waits
                pass
        self._processes = []

    def standstills(self) -> list[float]:
        """By how many seconds a thread woke up late since the last call, each time that it was more than LATE_S."""
        lines = [line for process in self._processes if process.stdout for line in process.stdout.readlines()]
        return [*map(float, lines)]


def tick(cpu: int, real_time: bool) -> None:
    """Wake up again and again on a CPU, and print by how many seconds it was late, as long as the parent lives."""
    os.sched_setaffinity(0, {cpu})
    if real_time:
        try:
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        except PermissionError:
            real_time = False
    print(REAL_TIME if real_time else WATCHING, flush=True)
    period, parent, last = PERIOD_S if real_time else IDLE_PERIOD_S, os.getppid(), time.monotonic()
    while os.getppid() == parent:
        time.sleep(period)
        now = time.monotonic()
        if now - last - period > LATE_S:
            print(now - last - period, flush=True)
        last = now


if __name__ == "__main__":
    tick(int(sys.argv[1]), sys.argv[2] == REAL_TIME)
