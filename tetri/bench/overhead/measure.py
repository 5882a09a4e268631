"""Compute the results from the arrival times of tokens, in seconds of the monotonic clock that all processes share."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from tetri.bench.report import BenchError, spread


class Run:
    """One round. The caller appends the arrival times of each request's tokens to `arrivals`.

    The steady window begins when every request has its second token (the first one comes from the prefill) and ends
    when one request has all tokens. `cpu` has the decoding process's CPU seconds at these two times."""

    def __init__(self, arrivals: list[list[float]], tokens: int, cpu: Callable[[], float]) -> None:
        self.arrivals = arrivals
        self.cpu: list[float] = []
        self._tokens, self._read_cpu = tokens, cpu

    def look(self) -> None:
        """Record the CPU time at both ends of the steady window. Call it after every step or message."""
        counts = [len(times) for times in self.arrivals]
        begun, ended = min(counts) >= 2, max(counts) >= self._tokens
        if (begun and not self.cpu) or (ended and len(self.cpu) == 1):
            self.cpu.append(self._read_cpu())

    def plain(self, ids: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Return the round as plain values for JSON."""
        return {"arrivals": self.arrivals, "ids": ids, "cpu": self.cpu}


@contextmanager
def stopped(pids: Sequence[int]) -> Iterator[None]:
    """Stop these processes (SIGSTOP) in this context: even an idle process takes 1 or 2 percent of the CPU that is
    measured."""
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def cpu_seconds(pid: int) -> float:
    """Return the user and system CPU time of a process, in seconds."""
    fields = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def steady(run: dict[str, Any]) -> dict[str, float]:
    """Return the results of a round's steady window. Raises BenchError if the requests never all ran together."""
    arrivals: list[list[float]] = run["arrivals"]
    start = max(times[1] for times in arrivals)
    stop = min(times[-1] for times in arrivals)
    inside = [[t for t in times if start <= t <= stop] for times in arrivals]
    if min(map(len, inside)) < 3:
        raise BenchError("no steady window: the first request ended before the last one ran; use more --tokens")
    # Tokens of one step arrive in a burst. The intervals of a request contain whole steps; a plain count would cut the
    # bursts at the ends of the window.
    rates = [(len(times) - 1) / (times[-1] - times[0]) for times in inside]
    gaps = [1000 * (b - a) for times in inside for a, b in pairwise(times)]
    steps = max(map(len, inside)) - 1
    return {
        "tok_s": sum(rates),
        "step_ms": spread(gaps),
        "cpu_step_ms": 1000 * (run["cpu"][1] - run["cpu"][0]) / steps,
        "seconds": stop - start,
        "steps": steps,
    }


def handover(samples: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Summarise `samples` of {"prompt_tokens", "ms" from the first to the second token, "step_ms" of a decode step}."""
    times = spread(sample["ms"] for sample in samples)
    step = median(sample["step_ms"] for sample in samples)
    limit = 2 * step + 10
    return {
        "ms": times,
        "step_ms": step,
        "limit_ms": limit,
        "ok": times["median"] <= limit,
        "samples": list(samples),
    }


def summary(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Summarise `rounds` of {"direct": window, "live": window, "same_outputs", "idle": samples, "busy": samples}."""
    ratios = [r["live"]["tok_s"] / r["direct"]["tok_s"] for r in rounds]
    cpu_ratios = [r["direct"]["cpu_step_ms"] / r["live"]["cpu_step_ms"] for r in rounds]
    moved = {load: handover([s for r in rounds for s in r[load]]) for load in ("idle", "busy")}
    return {
        "direct_tok_s": median(r["direct"]["tok_s"] for r in rounds),
        "live_tok_s": median(r["live"]["tok_s"] for r in rounds),
        "ratio": median(ratios),
        "ratios": ratios,
        "cpu_ratio": median(cpu_ratios),  # of CPU time per step: other load on the machine hardly changes it
        "handover_ms": max(found["ms"]["median"] for found in moved.values()),
        "handover": moved,
        "rounds": [{name: r[name] for name in ("direct", "live", "same_outputs")} for r in rounds],
    }
