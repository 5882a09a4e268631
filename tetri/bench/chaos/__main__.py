"""chaos: send thousands of requests while faults are injected into the KV hand-over: messages are lost, duplicated,
late, reordered and replayed, bytes are flipped, chunks are truncated, and workers kill themselves during a hand-over.

    tools/chaos --requests 10000 --transport stream --seed 2

Starts an emulated cluster, so small that requests are also refused for lack of memory. Every answer is compared with
the correct one for its prompt. Exit status 0: no token is wrong, no request takes longer than --bound, all KV blocks
and slots are free at the end, and no process, socket or shared memory is left. The only allowed error is that the
broker gives up a request whose attempts all failed; these are counted separately, and the default rates cause none."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

import click

from tetri.bench.chaos.traffic import WATCH_S, Findings, Traffic
from tetri.bench.deployment import (
    EMULATED,
    EXPECTED,
    START_S,
    after_the_end,
    configured,
    logged,
    own_folder,
    polled,
    running,
    segments,
)
from tetri.bench.report import Program, as_json, give, one_line, overrides, progress, spread, table
from tetri.client import Client
from tetri.config import Config

FAULTS = (
    "drop=0.01,duplicate=0.01,delay=0.02,reorder=0.01,replay=0.005,"
    "flip=0.01,truncate=0.01,lose=0.003,late=0.02,spoil=0.002,die=0.0002"
)
SHAPE = (
    "engine.chunk_tokens=64",
    "engine.max_batch=16",
    "engine.block_tokens=16",
    "emulated.blocks=96",
    "emulated.context=1024",
    "transfer.slab_blocks=24",
    "transfer.offer_s=0.1",
    "broker.max_deaths=1000",  # no request is guilty of the deaths here
)
ROLES = ("prefill", "decode", "auto")
CURES = (  # a fault, counters that it raises (others may raise them too), and the repair
    ("drop", (), "the message is sent again"),
    ("duplicate", ("duplicate",), "the same answer is sent again"),
    ("delay", ("late", "reordered"), "chunks may land in any order"),
    ("reorder", ("late", "reordered"), "chunks may land in any order"),
    ("replay", ("late", "old_attempt", "duplicate"), "messages name attempt and offer"),
    ("flip", ("flipped",), "fetched again"),
    ("truncate", ("truncated",), "fetched again"),
    ("lose", ("lost",), "fetched again, or another attempt"),
    ("late", ("lost",), "wait, or another attempt"),
    ("spoil", ("flipped", "given_up"), "another attempt"),
    ("die", ("workers_lost",), "another attempt, a new process"),
)
KILLED = "killing itself, as transfer.faults wants it"


def settings(transport: str, faults: str, counts: tuple[int, ...]) -> list[str]:
    """Return the settings of a cluster of emulated engines whose steps take no time. `counts`: workers of each role of
    ROLES."""
    named = zip(ROLES, counts, strict=True)
    workers = [f"{{iid='{role[0]}{i}', role='{role}'}}" for role, count in named for i in range(count)]
    moved = [f"transfer.transport={transport}", f'transfer.faults="{faults}"']
    return [f"worker=[{','.join(workers)}]", *SHAPE, *moved]


def left_over(config: Config, findings: Findings, wait_s: float) -> list[str]:
    """Return what the running cluster still holds after `wait_s`: requests, blocks, slots, segments of dead workers."""
    with Client(config.clients_address) as client:

        def read() -> list[str]:
            status = client.status()
            findings.add_status(status)
            found = [f"{count} requests {stage}" for stage, count in status["requests"].items() if count]
            for instance in status["instances"]:
                found += [f"{instance['iid']}: {problem}" for problem in _kept(instance)]
            names = segments(config)
            if len(names) > len(config.workers):
                found.append(f"segments of dead workers: {', '.join(names)}")
            return found

        return polled(read, lambda found: not found, wait_s, WATCH_S)


def _kept(instance: dict[str, Any]) -> list[str]:
    if instance["state"] != "ready":
        return [f"{instance['state']}: {instance['note']}"]
    missing = instance["blocks"] - instance["load"]["free_blocks"]
    kept = [f"{missing} blocks are not free"] * bool(missing)
    kept += [f"{instance['slots_used']} slots are not free"] * bool(instance["slots_used"])
    return kept + [f"{instance['held']} requests are held"] * bool(instance["held"])


def measured(config: Config, requests: int, seed: int, width: int, bound_s: float) -> dict[str, Any]:
    """Run the traffic on a cluster and return the results. Raises the errors of EXPECTED."""
    findings = Findings()
    with running(config, progress, START_S):
        start = time.monotonic()
        asyncio.run(Traffic(config, seed, width, bound_s, findings).run(requests))
        seconds = time.monotonic() - start
        leaked = left_over(config, findings, bound_s)
    text = logged(config)
    counters = findings.counters()
    injected = {name.removeprefix("injected_"): n for name, n in counters.items() if name.startswith("injected_")}
    return {
        "requests": requests,
        "seconds": round(seconds, 1),
        "per_second": round(requests / seconds, 1),
        "chunks": findings.chunks,
        "injected": {**injected, "die": text.count(KILLED)},
        "seen": {name: count for name, count in counters.items() if not name.startswith("injected_")},
        "broker": findings.broker,
        "attempts": dict(sorted(findings.attempts.items())),
        "latency_s": spread(findings.seconds),
        "slowest": findings.slowest,
        "given_up": dict(findings.tired),
        "errors": dict(findings.refused),
        "wrong": findings.wrong,
        "hung": findings.hung,
        "leaked": leaked + after_the_end(config),
        "crashes": text.count("Traceback (most recent call last)"),
    }


def good(run: dict[str, Any]) -> bool:
    """Whether the run has no problem."""
    return not any(run[problem] for problem in ("wrong", "hung", "leaked", "errors", "crashes"))


def shown(run: dict[str, Any]) -> str:
    """Format the results as text."""
    rate = f"{run['per_second']} per second, {run['chunks']} chunks"
    counted = {**run["seen"], **run["broker"]}
    rows = []
    for name, signs, cure in CURES:
        seen = ", ".join(f"{sign} {counted.get(sign, 0)}" for sign in signs) or "silence"
        rows.append([name, str(run["injected"].get(name, 0)), seen, cure])
    lines = [f"{run['requests']} requests over {run['transport']} in {run['seconds']} s, {rate}", ""]
    lines.append(table(("fault", "injected", "seen as", "repaired by"), rows))
    for name in ("seen", "broker", "attempts", "given_up", "errors"):
        findings = ", ".join(f"{key} {value}" for key, value in run[name].items() if value)
        lines += ["", f"{name}: {findings or 'none'}"]
    latency = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in run["latency_s"].items())
    lines += ["", f"latency: {latency}; the slowest:"]
    lines += [f"    {seconds:6.2f} s  {line}" for seconds, line in run["slowest"]]
    for name in ("wrong", "hung", "leaked"):
        lines.append(f"{name}: {len(run[name])}")
        lines += [f"    {line}" for line in run[name][:10]]
    return "\n".join([*lines, f"crashes: {run['crashes']}"])


@click.command(cls=Program)
@click.option("--requests", type=click.IntRange(1), default=10_000, show_default=True)
@click.option("--transport", type=click.Choice(["auto", "shm", "stream", "nixl"]), default="shm", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--faults", default=FAULTS, show_default=True, help="As transfer.faults, without a seed.")
@click.option("--width", type=click.IntRange(1), default=48, show_default=True, help="Concurrent requests.")
@click.option(
    "--workers",
    type=(click.IntRange(0),) * len(ROLES),
    default=(2, 2, 0),
    show_default=True,
    help="Numbers of prefill, decode and auto workers.",
)
@click.option(
    "--bound",
    type=click.FloatRange(1),
    default=30.0,
    show_default=True,
    help="Seconds after which a request counts as hung.",
)
@overrides
@click.option("--keep", is_flag=True, help="Keep the run directory with the logs.")
@as_json
def main(
    requests: int,
    transport: str,
    seed: int,
    faults: str,
    width: int,
    workers: tuple[int, ...],
    bound: float,
    overrides: tuple[str, ...],
    keep: bool,
    as_json: bool,
) -> None:
    """Serve requests while faults are injected, and check every answer."""
    injected = f"{faults},seed={seed}" if faults else ""
    with one_line("chaos", *EXPECTED, status=2), own_folder("chaos", keep) as folder:
        more = [*settings(transport, injected, workers), *overrides]
        config = configured(EMULATED, folder, "chaos", more)
        run = measured(config, requests, seed, width, bound)
    run = {"transport": transport, "seed": seed, "workers": workers, "limit_s": bound, **run, "ok": good(run)}
    give(run, shown(run), as_json)
    sys.exit(0 if run["ok"] else 1)


if __name__ == "__main__":
    main(prog_name="chaos")
