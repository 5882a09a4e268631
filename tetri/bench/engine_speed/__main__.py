"""bench_engine: how long engine steps take: by the limits of the core, in vLLM called in a loop, in tetri's engine and
in a whole worker.

    tools/bench_engine                      vLLM eager and compiled, the engine, the worker
    tools/bench_engine --against ../before  the engine of another checkout, too
    tools/bench_engine --profile            where the time of a step goes

Each side is a process with its own engine. All are on the same core, and one at a time computes: in each round every
side runs some steps, in another order each time. A side's time is the median over the rounds of its median step.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import click

from tetri.bench.deployment import EXPECTED, configured, own_folder
from tetri.bench.engine_speed.limits import model_size
from tetri.bench.report import BenchError, Program, as_json, conf, give, interval, one_line, overrides, progress, table
from tetri.config import Config, default_path, dump
from tetri.kv.shm import sweep
from tetri.models import find
from tetri.paths import FOLDER

FILE = Path(__file__).with_name("side.py")
BATCHES = (1, 8, 32)
STEPS = 6  # decode steps of a round; a round of chunks has one


class Side:
    """The process of one side."""

    def __init__(
        self, name: str, kind: str, cpu: int, engine: dict[str, Any], checkout: Path | None, log: Path
    ) -> None:
        self.name, self._log = name, log
        command = [sys.executable, "-P", str(FILE), kind, json.dumps({"cpu": cpu, "engine": engine})]
        environment = {**os.environ, **({"PYTHONPATH": str(checkout.resolve())} if checkout else {})}
        with open(log, "wb") as output:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, text=True, env=environment
            )

    def ask(self, do: str, **given: Any) -> Any:
        """Have the process do something, and return what it found. Raises BenchError if it ends."""
        assert self._process.stdin is not None
        try:
            print(json.dumps({"do": do, **given}), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            pass
        return self.answer()["found"]

    def answer(self) -> Any:
        """Wait for the next line of the process."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            output = self._log.read_text(errors="replace").strip().splitlines() or ["no reason in its log"]
            raise BenchError(f"the side {self.name!r} ended: {output[-1]}")
        return json.loads(line)

    def close(self) -> None:
        """Kill the process; nothing needs a clean shutdown."""
        with self._process:
            self._process.kill()


def start(config: Config, cpu: int, compiled: bool, against: Path | None, folder: Path, stack: ExitStack) -> list[Side]:
    """Start the sides one after the other; `stack` closes them."""
    model, engine = config.model, config.engine
    plain = {
        "model": str(find(model.name)),
        "dtype": model.dtype,
        "context": model.context,
        "chunk_tokens": engine.chunk_tokens,
        "max_batch": engine.max_batch,
        "block_tokens": engine.block_tokens,
        "kv_bytes": engine.kv_mib << 20,
    }
    own = {"conf": str(folder / "conf.toml"), "overrides": []}
    (folder / "conf.toml").write_text(dump(config))
    wanted: list[tuple[str, str, dict[str, Any], Path | None]] = [("vllm", "plain", plain, None)]
    if compiled:
        wanted.append(("vllm compiled", "plain", {**plain, "compiled": True}, None))
    if against is not None:
        wanted.append(("before", "engine", own, against))
    wanted += [("engine", "engine", own, None), ("worker", "worker", own, None)]
    sides = []
    for name, kind, settings, checkout in wanted:
        progress(f"starting {name}")
        side = Side(name, kind, cpu, settings, checkout, folder / f"{name.replace(' ', '-')}.log")
        stack.callback(side.close)
        side.answer()
        sides.append(side)
    return sides


def limits(config: Config, cpu: int, folder: Path, context: int, chunk: int) -> dict[str, Any]:
    """What the core reads and computes in a second, and the least milliseconds of each kind of step."""
    dtype = config.model.dtype
    side = Side("machine", "machine", cpu, {"dtype": dtype}, None, folder / "machine.log")
    try:
        side.answer()
        machine = side.ask("machine")
    finally:
        side.close()
    size = model_size(find(config.model.name), dtype)
    found = {f"decode {batch}": size.decode(batch, context) for batch in BATCHES}
    found[f"chunk {chunk}"] = size.chunk(chunk)
    rates = machine["bytes_s"], machine["operations_s"]
    least = {
        name: [1000 * amount / rate for amount, rate in zip(each, rates, strict=True)] for name, each in found.items()
    }
    return {
        "machine": machine,
        "least_ms": {name: dict(zip(("memory", "arithmetic"), ms, strict=True)) for name, ms in least.items()},
    }


def measure(sides: Sequence[Side], rounds: int, context: int, chunk: int) -> dict[str, dict[str, list[float]]]:
    """For each kind of step and side, the median milliseconds of a step in each round."""
    rng, found = Random(1), dict[str, dict[str, list[float]]]()
    for batch in BATCHES:
        progress(f"decode steps of {batch} requests")
        for side in sides:
            side.ask("begin", batch=batch, context=context)
            side.ask("steps", count=STEPS)  # not measured: warm-up
        found[f"decode {batch}"] = _rounds(sides, rounds, rng, "steps", count=STEPS)
        for side in sides:
            side.ask("end")
    progress(f"chunks of {chunk} tokens")
    for side in sides:
        side.ask("chunks", tokens=chunk, count=1)
    found[f"chunk {chunk}"] = _rounds(sides, rounds, rng, "chunks", tokens=chunk, count=1)
    return found


def _rounds(sides: Sequence[Side], rounds: int, rng: Random, do: str, **given: Any) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {side.name: [] for side in sides}
    for _ in range(rounds):
        for side in rng.sample(sides, len(sides)):
            times[side.name].append(1000 * median(side.ask(do, **given)))
    return times


def summary(times: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """For each kind of step and side: `ms`, and `ratio` to vLLM in the same rounds with its interval."""
    made: dict[str, Any] = {}
    for kind, sides in times.items():
        made[kind] = {}
        for name, found in sides.items():
            ratios = [own / other for own, other in zip(found, sides["vllm"], strict=True)]
            made[kind][name] = {
                "ms": median(found),
                "ratio": {"median": median(ratios), **interval(ratios)},
                "rounds": found,
            }
    return made


def shown(found: dict[str, Any]) -> str:
    """Format the result as two tables."""
    names = [*next(iter(found["steps"].values()))]
    rows, ratios = [], []
    for kind, sides in found["steps"].items():
        least = found["limits"]["least_ms"][kind]
        rows.append([kind, *(f"{ms:.1f}" for ms in least.values()), *(f"{sides[name]['ms']:.1f}" for name in names)])
        for name in names[1:]:
            ratio = sides[name]["ratio"]
            ratios.append([kind, name, *(f"{ratio[key]:.3f}" for key in ("median", "low", "high"))])
    machine = found["limits"]["machine"]
    lines = [f"memory {machine['bytes_s'] / 1e9:.1f} GB/s, arithmetic {machine['operations_s'] / 1e9:.0f} GFLOP/s"]
    lines.append(table(("ms a step", "memory", "arithmetic", *names), rows))
    lines.append(table(("ratio to vllm", "side", "median", "low", "high"), ratios))
    return "\n\n".join(lines)


def profiles(sides: Sequence[Side], context: int) -> dict[str, dict[str, dict[str, float]]]:
    """For each decode batch and side, where the milliseconds of a step go."""
    made: dict[str, dict[str, dict[str, float]]] = {}
    for batch in BATCHES:
        made[f"decode {batch}"] = parts = {}
        for side in sides:
            progress(f"profile of {side.name}, decode steps of {batch} requests")
            side.ask("begin", batch=batch, context=context)
            parts[side.name] = side.ask("profile", count=20)
            side.ask("end")
    return made


def shown_profiles(made: dict[str, dict[str, dict[str, float]]]) -> str:
    """Format the profiles as a table for each kind of step."""
    tables = []
    for kind, sides in made.items():
        parts = dict.fromkeys(part for found in sides.values() for part in found)
        rows = [[part, *(f"{found[part]:.2f}" if part in found else "" for found in sides.values())] for part in parts]
        tables.append(table((f"{kind}, ms a step", *sides), rows))
    return "\n\n".join(tables)


@click.command(cls=Program)
@conf
@click.option("--cpu", type=click.IntRange(0), help="The CPU of all sides (default: the last that it may use).")
@click.option("--rounds", type=click.IntRange(2), default=12, show_default=True, help="Rounds of all sides.")
@click.option(
    "--context", type=click.IntRange(1), default=512, show_default=True, help="Tokens of a request that decodes."
)
@click.option("--compiled/--no-compiled", default=True, show_default=True, help="Also vLLM with its compiler.")
@click.option("--against", type=FOLDER, help="A checkout of tetri whose engine is measured, too.")
@click.option("--profile", is_flag=True, help="Show where the time of decode steps goes instead.")
@overrides
@as_json
def main(
    conf: Path | None,
    cpu: int | None,
    rounds: int,
    context: int,
    compiled: bool,
    against: Path | None,
    profile: bool,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Measure engine steps. Takes some minutes and needs an idle machine."""
    with one_line("bench_engine", *EXPECTED), own_folder("engine") as folder, ExitStack() as stack:
        config = configure(conf or default_path(), overrides, folder)
        stack.callback(sweep, config.cluster.name)  # what the killed worker leaves in shared memory
        core = max(os.sched_getaffinity(0)) if cpu is None else cpu
        chunk = config.engine.chunk_tokens
        sides = start(config, core, compiled, against, folder, stack)
        if profile:
            made = profiles(sides[:-1], context)
            give({"profile": made}, shown_profiles(made), as_json)
            return
        steps = summary(measure(sides, rounds, context, chunk))
        found = {"context": context, "limits": limits(config, core, folder, context, chunk), "steps": steps}
    give(found, shown(found), as_json)


def configure(conf: Path, overrides: tuple[str, ...], folder: Path) -> Config:
    """Load the configuration with its own run directory; its first worker does both phases."""
    config = configured(conf, folder, "engine", overrides)
    if config.engine.kind != "vllm":
        raise BenchError("only the real engine can be compared with vLLM: use a configuration with engine.kind = vllm")
    return configured(conf, folder, "engine", [*overrides, f"worker.{config.workers[0].iid}.role=mixed"])


if __name__ == "__main__":
    main(prog_name="bench_engine")
