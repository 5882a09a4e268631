"""Starts tetri's programs as forks of one process that has imported them: for a test's cluster the imports are most of
what a start costs. `Program` is that process's child; what it looks like from outside is `subprocess.Popen`.

As a program of its own it is that process: a line of JSON asks, a line answers."""

from __future__ import annotations

import atexit
import contextlib
import functools
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
    """`name`: broker, gateway, monitor, worker, or with `vllm` engine (engine/vllm/vllm_process.py); `prologue`:
    statements that it runs first; `output`: a file it appends to; `vllm`: the parent has imported vLLM too."""

    def __init__(
        self, name: str, arguments: Sequence[str], prologue: str = "", output: str = os.devnull, vllm: bool = False
    ) -> None:
        self.vllm = vllm
        question = {"start": name, "arguments": arguments, "prologue": prologue, "output": output}
        self.pid: int = _asked(question, vllm)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit status, or minus the signal that ended it; None while it runs."""
        if self.returncode is None:
            self.returncode = _asked({"poll": self.pid}, self.vllm)
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


_one_at_a_time = threading.Lock()


@functools.cache
def _parent(vllm: bool) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", __file__, *["vllm"] * vllm]
    parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(parent.communicate)
    return parent


def _asked(question: dict[str, Any], vllm: bool) -> Any:
    with _one_at_a_time:
        parent = _parent(vllm)
        assert parent.stdin is not None and parent.stdout is not None
        parent.stdin.write(json.dumps(question) + "\n")
        parent.stdin.flush()
        return json.loads(parent.stdout.readline())


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
    sys.stdin = os.fdopen(0)  # as at a program's start: nothing was read yet
    sys.argv = [f"tetri-{wanted['start']}", *wanted["arguments"]]
    exec(wanted["prologue"])
    PROGRAMS[wanted["start"]]()


if __name__ == "__main__":
    import tetri.engine.emulated  # what a worker imports only when it needs it
    import tetri.kv.shm
    import tetri.kv.stream.stream  # noqa: F401
    from tetri.proc import broker, monitor, worker
    from tetri.proc.gateway import process as gateway

    PROGRAMS = {"broker": broker.main, "gateway": gateway.main, "monitor": monitor.main, "worker": worker.main}
    if "vllm" in sys.argv:
        from tetri.engine.vllm.setup import prepare_environment

        prepare_environment()
        os.environ["OMP_NUM_THREADS"] = "1"  # each engine is on one core
        sys.path[:0] = [str(Path(__file__).parent / "engine" / "vllm"), str(Path(__file__).parent)]
        with contextlib.redirect_stdout(sys.stderr):  # vLLM's log may not be an answer
            import vllm.distributed.kv_transfer.kv_connector.factory
            import vllm.model_executor.models.llama
            import vllm.v1.engine.core
            import vllm.v1.worker.cpu_worker  # noqa: F401
            import vllm_process
        PROGRAMS["engine"] = vllm_process.serve
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests to hear
    gc.freeze()
    if (wanted := serve()) is not None:
        become(wanted)
