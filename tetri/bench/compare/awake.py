"""Keep the machine awake while something is measured, and note when it stood still.

On some virtual machines, while all CPUs are busy, runnable threads wait seconds for a CPU. A real-time process on each
CPU that wakes every few milliseconds prevents some of that; it takes less than 1 % of a CPU. Only root, or a process
with CAP_SYS_NICE, may have one. Another cause is the kernel's autogroup, which divides CPU time among sessions: beside
workers that never wait, a process of another session was seen to wait 12 s. Threads that are like any other notice when
they wake up late: what was measured meanwhile says nothing about what was measured.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

PERIOD_S, WATCH_S = 0.005, 0.05  # between two wake-ups: of real-time processes, of threads that watch
LATE_S = 0.3
REAL_TIME, REFUSED = "real-time", "refused"
AUTOGROUP = Path("/proc/sys/kernel/sched_autogroup_enabled")


class Awake:
    """Context manager. `real_time`: whether processes keep the machine awake, known once it is entered. `wanted` False:
    there are only threads that watch."""

    def __init__(self, wanted: bool = True) -> None:
        self.real_time = wanted
        self._processes: list[subprocess.Popen[str]] = []
        self._threads: list[threading.Thread] = []
        self._stopped = threading.Event()
        self._standstills: list[float] = []

    def __enter__(self) -> Awake:
        cpus = sorted(os.sched_getaffinity(0))
        for cpu in cpus if self.real_time else ():
            command = [sys.executable, "-P", "-m", __name__, str(cpu)]
            self._processes.append(
                subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
            )
        for process in self._processes:
            assert process.stdout is not None
            self.real_time = process.stdout.readline().strip() == REAL_TIME and self.real_time
        started = threading.Barrier(len(cpus) + 1)
        for cpu in cpus:
            thread = threading.Thread(target=self._watch, args=(cpu, started), name=f"awake {cpu}", daemon=True)
            self._threads.append(thread)
            thread.start()
        started.wait()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()
        for process in self._processes:
            process.kill()
            with process:  # closes its pipe, and waits
                pass

    def standstills(self) -> list[float]:
        """By how many seconds a thread woke up late since the last call, each time that it was more than LATE_S."""
        found, self._standstills = self._standstills, []
        return found

    def advice(self, autogroup: Path = AUTOGROUP) -> str | None:
        """What would keep this machine from standing still; None if nothing is known."""
        if autogroup.exists() and autogroup.read_text().strip() == "1":
            return "busy sessions may halt each other for seconds: as root, sysctl kernel.sched_autogroup_enabled=0"
        return None if self.real_time else "no real-time processes (only root may have them): it may stand still"

    def _watch(self, cpu: int, started: threading.Barrier) -> None:
        os.sched_setaffinity(threading.get_native_id(), {cpu})
        last = time.monotonic()
        started.wait()
        while not self._stopped.is_set():
            time.sleep(WATCH_S)
            now = time.monotonic()
            if now - last - WATCH_S > LATE_S:
                self._standstills.append(now - last - WATCH_S)
            last = now


def tick(cpu: int) -> None:
    """Wake up on a CPU again and again as a real-time process, as long as the parent lives. Print whether it is one."""
    parent = os.getppid()
    os.sched_setaffinity(0, {cpu})
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except PermissionError:
        print(REFUSED, flush=True)
        return
    print(REAL_TIME, flush=True)
    while os.getppid() == parent:
        time.sleep(PERIOD_S)


if __name__ == "__main__":
    tick(int(sys.argv[1]))
