"""bench_relay: what it costs the broker and the HTTP gateway to relay tokens to clients, and how long it takes.

A played worker sends one token of every stream at once, at a fixed pace, to a broker; clients read the streams from the
broker over ZeroMQ, then from a gateway over HTTP. Nothing computes.

broker_tok_cpu_s      tokens that the broker relays per second of its processor time
gateway_events_cpu_s  events that the gateway writes per second of its processor time, one token each
added_ms_p50, _p99    latency of a token over HTTP, from the worker on, less that over ZeroMQ: median, 99th percentile
few                   the latter with few streams
"""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import click

from tetri.bench.deployment import EMULATED, EXPECTED, START_S, configured, own_folder, polled
from tetri.bench.relay.readers import Stream, over_http, over_zmq
from tetri.bench.relay.worker import play
from tetri.bench.report import BenchError, Program, as_json, give, one_line, progress, table
from tetri.config import Config
from tetri.metrics import summarise

FEW, FEW_STEP_S = 16, 0.02
BROKER, GATEWAY = 40_000, 8_000  # at least
MOST_MS = {"added_ms_p50": 15.0, "added_ms_p99": 100.0}
MOST_FEW_MS = {"added_ms_p50": 2.0}
PROGRAMS = {"broker": "tetri.proc.broker", "gateway": "tetri.proc.gateway.process"}
SETTINGS = ["cluster.dead_s=120"]


class Phase(NamedTuple):
    """`latencies_s` of all tokens, `cpu_s` of the relaying process, and `events` that carried tokens."""

    latencies_s: list[float]
    cpu_s: float
    events: int

    @property
    def per_cpu_s(self) -> float:
        """Tokens per second of processor time."""
        return len(self.latencies_s) / self.cpu_s


class Relay:
    """The processes: a broker, a gateway if there is HTTP, and the played workers. `url`: the gateway's."""

    def __init__(self, config: Config, pids: dict[str, int], orders: Connection, url: str) -> None:
        self.config, self.pids, self.orders, self.url = config, pids, orders, url

    def phase(
        self, http: bool, streams: int, steps: int, step_s: float, first: Callable[[], None] = lambda: None
    ) -> Phase:
        """Let clients read streams; `first` is called with the first token. Raises BenchError unless all tokens
        arrive."""
        self.orders.send((streams, steps, step_s))
        pid, begun = self.pids["gateway" if http else "broker"], list[float]()
        address, read = (self.url, over_http) if http else (self.config.clients_address, over_zmq)

        def begin() -> None:
            begun.append(cpu_s(pid))
            first()

        found = read(address, streams, steps, begin)
        used = cpu_s(pid) - begun[0]
        return measured(found, _answer(self.orders), streams, used)

    def shares(self, seconds: float) -> dict[str, float]:
        """The processor time of each process in the next seconds, over the time that passes."""
        begun = self._clocks()
        time.sleep(seconds)
        used = {name: at - begun[name] for name, at in self._clocks().items()}
        return {name: used[name] / used["passed"] for name in self.pids}

    def _clocks(self) -> dict[str, float]:
        return {"passed": time.monotonic(), **{name: cpu_s(pid) for name, pid in self.pids.items()}}


def _answer(orders: Connection) -> Any:
    try:
        return orders.recv()
    except EOFError:
        raise BenchError("the played workers have died") from None


def measured(found: Sequence[Stream], sent: Sequence[float], streams: int, used_s: float) -> Phase:
    """What the streams tell, whose tokens were sent at these times. Raises BenchError unless all are complete."""
    whole = sum(len(stream.tokens) == len(sent) for stream in found)
    if whole != streams:
        raise BenchError(f"{whole} of {streams} streams are complete")
    latencies = [at - begun for stream in found for at, begun in zip(stream.tokens, sent, strict=True)]
    return Phase(latencies, used_s, sum(stream.events for stream in found))


def cpu_s(pid: int) -> float:
    """Processor time of all threads of a process."""
    return time.clock_gettime(~pid << 3 | 2)  # as clock_getcpuclockid(3) makes it


@contextmanager
def running(folder: Path, http: bool, instances: int = 1) -> Iterator[Relay]:
    """Start the processes, with so many played workers, and stop them at the end. Raises BenchError."""
    config = configured(EMULATED, folder, "relay", SETTINGS)
    context, programs = multiprocessing.get_context("spawn"), dict[str, subprocess.Popen[bytes]]()
    ours, theirs = context.Pipe()
    inboxes = {iid: config.inbox_address(iid) for iid in (f"m{number}" for number in range(instances))}
    player = context.Process(target=play, args=(config.events_address, inboxes, theirs), daemon=True)
    try:
        player.start()
        theirs.close()
        for name in PROGRAMS if http else ["broker"]:
            programs[name] = _start(folder, name)
        url = _found(folder, lambda: _url(folder), programs) if http else ""
        _found(folder, lambda: "clients" if (folder / "clients").exists() else "", programs)
        _answer(ours)  # all workers are registered
        yield Relay(config, {name: program.pid for name, program in programs.items()}, ours, url)
    finally:
        for program in programs.values():
            program.terminate()
        for program in programs.values():
            program.wait(START_S)
        player.kill()
        player.join()


def _start(folder: Path, name: str) -> subprocess.Popen[bytes]:
    settings = [f"cluster.run_dir={folder}", *SETTINGS, *(["gateway.port=0"] if name == "gateway" else [])]
    command = [sys.executable, "-P", "-c", f"from {PROGRAMS[name]} import main; main()", "--conf", str(EMULATED)]
    command += [part for setting in settings for part in ("--set", setting)]
    with (folder / f"{name}.out").open("wb") as output:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)


def _url(folder: Path) -> str:
    from tetri.proc.gateways import urls

    return next(iter(urls(folder).values()), "")


def _found(folder: Path, read: Callable[[], str], programs: dict[str, subprocess.Popen[bytes]]) -> str:
    """Wait for what the programs create. Raises BenchError when one ends before."""

    def dead() -> list[str]:
        return [name for name, program in programs.items() if program.poll() is not None]

    value = polled(read, lambda found: bool(found or dead()), START_S, 0.02)
    if not value:
        output = "".join((folder / f"{name}.out").read_text(errors="replace") for name in programs)
        raise BenchError(f"{', '.join(dead()) or 'a program'} did not start: {output[-1000:].strip()}")
    return value


# ---------------------------------------------------------------- the figures


def added_ms(http: Phase, zmq: Phase) -> dict[str, float]:
    """By how much percentiles of the latency over HTTP exceed those over ZeroMQ."""
    over, under = summarise(http.latencies_s), summarise(zmq.latencies_s)
    return {
        "added_ms_p50": round(1000 * (over.p50 - under.p50), 2),
        "added_ms_p99": round(1000 * (over.p99 - under.p99), 2),
    }


def figures(relay: Relay, http: bool, streams: int, rate: float, seconds: float) -> dict[str, Any]:
    """All figures, and whether they are within their limits. Raises BenchError."""
    step_s = streams / rate
    steps, few = max(2, round(seconds / step_s)), max(2, round(seconds / FEW_STEP_S))
    progress(f"ZeroMQ: {streams} streams, {rate:g} tokens/s in all, {seconds:g} s")
    many = relay.phase(False, streams, steps, step_s)
    found: dict[str, Any] = {"broker_tok_cpu_s": round(many.per_cpu_s)}
    ok = many.per_cpu_s >= BROKER
    if http:
        progress("HTTP: the same")
        there = relay.phase(True, streams, steps, step_s)
        progress(f"ZeroMQ and HTTP: {FEW} streams")
        small = [relay.phase(way, FEW, few, FEW_STEP_S) for way in (False, True)]
        found["gateway_events_cpu_s"] = round(there.events / there.cpu_s)
        found |= added_ms(there, many)
        found["few"] = {"streams": FEW, **added_ms(small[1], small[0])}
        found["tokens_an_event"] = round(len(there.latencies_s) / there.events, 3)
        ok = ok and found["gateway_events_cpu_s"] >= GATEWAY
        ok = ok and all(found[name] < most for name, most in MOST_MS.items())
        ok = ok and all(found["few"][name] < most for name, most in MOST_FEW_MS.items())
    return {"streams": streams, "rate": rate, **found, "ok": ok}


def shown(found: dict[str, Any]) -> str:
    """The figures as a table."""
    limits: dict[str, object] = {"broker_tok_cpu_s": BROKER, "gateway_events_cpu_s": GATEWAY, **MOST_MS}
    rows = [[name, str(found[name]), str(limit)] for name, limit in limits.items() if name in found]
    if "few" in found:
        rows += [[f"{name}, {FEW} streams", str(found["few"][name]), str(most)] for name, most in MOST_FEW_MS.items()]
    return "\n".join([table(["", "found", "limit"], rows), f"within the limits: {'yes' if found['ok'] else 'no'}"])


@click.command(cls=Program)
@click.option("--streams", type=click.IntRange(1, 1000), default=256, show_default=True, help="Open at once.")
@click.option("--rate", type=click.FloatRange(1), default=5000, show_default=True, help="Tokens/s of all streams.")
@click.option("--seconds", type=click.FloatRange(0.1), default=5.0, show_default=True, help="Of each of four phases.")
@click.option("--broker-only", is_flag=True, help="Measure no gateway.")
@as_json
def main(streams: int, rate: float, seconds: float, broker_only: bool, as_json: bool) -> None:
    """Measure what it costs the broker and the HTTP gateway to relay tokens, and how long it takes."""
    http = not broker_only
    with one_line("bench_relay", OSError, *EXPECTED), own_folder("relay") as folder, running(folder, http) as relay:
        found = figures(relay, http, streams, rate, seconds)
    give(found, shown(found), as_json)


if __name__ == "__main__":
    main(prog_name="bench_relay")
