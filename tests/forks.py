"""Starts tetri's programs as forks of one process that has imported them: for a test's cluster the imports are most of
what a start costs. `Program` is that process's child; what it looks like from outside is `subprocess.Popen`.

As a program of its own it is that process: a line of JSON asks, a line answers."""

from __future__ import annotations

import atexit
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Program:
    """`name`: broker, monitor or worker; `prologue`: statements that it runs first; `output`: a file it appends to."""

    def __init__(self, name: str, arguments: Sequence[str], prologue: str, output: Path) -> None:
        self.pid: int = _asked({"start": name, "arguments": arguments, "prologue": prologue, "output": str(output)})
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit status, or minus the signal that ended it; None while it runs."""
        if self.returncode is None:
            self.returncode = _asked({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float) -> int:
        until = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.002)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:  # until that is asked, its process id is nobody else's
            os.kill(self.pid, number)


_parent: subprocess.Popen[str] | None = None
_one_at_a_time = threading.Lock()


def _asked(question: dict[str, Any]) -> Any:
    global _parent
    with _one_at_a_time:
        if _parent is None:
            command = [sys.executable, "-P", __file__]
            _parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            atexit.register(_parent.communicate)
        assert _parent.stdin is not None and _parent.stdout is not None
        _parent.stdin.write(json.dumps(question) + "\n")
        _parent.stdin.flush()
        return json.loads(_parent.stdout.readline())


# ---------------------------------------------------------------- the process that is forked


def serve() -> dict[str, Any] | None:
    """Answer until nobody asks any more: None. In a fork: what it shall be."""
    for line in sys.stdin:
        question = json.loads(line)
        if "poll" in question:
            pid, status = os.waitpid(question["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif (answer := os.fork()) == 0:
            return question
        print(json.dumps(answer), flush=True)
    return None


def become(wanted: dict[str, Any]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    nothing = os.open(os.devnull, os.O_RDONLY)
    output = os.open(wanted["output"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.close(nothing)
    os.close(output)
    sys.argv = [f"tetri-{wanted['start']}", *wanted["arguments"]]
    exec(wanted["prologue"])
    PROGRAMS[wanted["start"]]()


if __name__ == "__main__":
    import tetri.engine.emulated  # what a worker imports only when it needs it
    import tetri.kv.shm
    import tetri.kv.stream.stream  # noqa: F401
    from tetri.proc import broker, monitor, worker

    PROGRAMS = {"broker": broker.main, "monitor": monitor.main, "worker": worker.main}
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests to hear
    gc.freeze()
    if (wanted := serve()) is not None:
        become(wanted)
