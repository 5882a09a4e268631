"""tetri-cli profile: measures an engine and writes its cost table."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import click

from tetri import atomic, terminal
from tetri.cli.options import COUNT, Overrides, deployment_options, examples
from tetri.paths import OUT_FILE

if TYPE_CHECKING:
    from tetri.config import Config
    from tetri.cost import Cost
    from tetri.profile.fit import Fit
    from tetri.profile.measure import MeasuredPoint

BUSY_SHARE = 0.97  # share of the core's time; below, other processes disturb the measurement
MEANING = "docs/cost.md says what each key means."
_EXAMPLES = examples(
    "tetri-cli profile --out my-machine.toml",
    "tetri-cli profile --quick --json",
    "tetri-cli profile --keep",
    "tetri-cli profile --kept",
)


@click.command("profile", epilog=_EXAMPLES)
@deployment_options
@click.option("--out", type=OUT_FILE, help="Write the cost table to this file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, with every measured point.")
@click.option("--quick", is_flag=True, help="Fewer sizes and rounds: a rough table in a fifth of the time.")
@click.option("--rounds", type=COUNT, metavar="N", help="Measurements per point (default: 5; --quick: 3).")
@click.option("--cpus", help='CPUs to run on, such as "0" or "0-1" (default: those of the first worker).')
@click.option("--cpu-time", is_flag=True, help="Measure this process's CPU time: for one core that others use as well.")
@click.option(
    "--keep", is_flag=True, help="Keep the table for workers with engine.cost = auto: from their next start on."
)
@click.option("--kept", is_flag=True, help="Measure nothing; list the tables that are kept, the newest first.")
def command(
    conf: Path | None,
    overrides: Overrides,
    out: Path | None,
    as_json: bool,
    quick: bool,
    rounds: int | None,
    cpus: str | None,
    cpu_time: bool,
    keep: bool,
    kept: bool,
) -> None:
    """Measure the engine of the configuration, in this process, and fit a cost table: seconds of a prefill by size and
    start of the chunk, seconds of a decode step by batch size and contexts, and a proposed chunk size."""
    from tetri.cost import CostError
    from tetri.engine.base import EngineError
    from tetri.models import ModelError
    from tetri.profile.fit import fit
    from tetri.profile.measure import ProfileError

    if kept:
        _list_kept(as_json)
        return
    config = _config(conf, overrides, cpus)
    rounds = rounds or (3 if quick else 5)
    try:
        measured = _measured(config, quick, rounds, cpu_time)
        made = fit(measured.points)
    except (EngineError, CostError, ProfileError, ModelError) as error:
        raise click.ClickException(str(error)) from None
    source = f"{measured.of}, {time.strftime('%Y-%m-%d')}, {rounds} rounds{', CPU time' if cpu_time else ''}"
    table = dataclasses.replace(made.cost, **measured.kv, source=source)
    head = [_command(click.get_current_context().params), *_summary(made, measured), MEANING]
    if as_json:
        terminal.print_json(_as_json(table, made, measured))
    else:
        click.echo("\n".join(_shown(table, made, measured)))
    _write(table, head, out, measured.path if keep else None)


def _write(table: Cost, head: list[str], out: Path | None, keep: Path | None) -> None:
    """Write the table to a file, and to one of the cache."""
    from tetri.cost import dump
    from tetri.proc import measured_cost

    if out:
        atomic.write_text(out, dump(table, head))
        terminal.tell(f"written to {out}")
    if keep:
        measured_cost.keep(table, keep, head)
        terminal.tell(f"kept as {keep}")


def _list_kept(as_json: bool) -> None:
    """Show the file and the origin of each table in the cache."""
    from tetri.cost import load
    from tetri.proc import measured_cost

    tables = {str(path): load(path) for path in measured_cost.kept()}
    if as_json:
        terminal.print_json({path: dataclasses.asdict(table) for path, table in tables.items()})
    else:
        click.echo("\n".join(f"{path}  {table.source}" for path, table in tables.items()) or "no table is kept")


def _config(conf: Path | None, overrides: Overrides, cpus: str | None) -> Config:
    """The configuration. `cpus` replaces the CPUs of the first worker, on which the engine runs. Raises UsageError."""
    from tetri.config import default_path, load

    conf = conf or default_path()
    config = load(conf, overrides)
    if cpus is not None:
        config = load(conf, [*overrides, f"worker.{config.workers[0].iid}.cpus={cpus}"])
    if config.engine.kind == "emulated" and not config.engine.table:
        raise click.UsageError("an emulated engine without engine.cost takes no time: give it a cost table")
    return config


@dataclasses.dataclass(frozen=True)
class MeasuredEngine:
    """The measurements and what they were made on.

    of          engine, model and cores, in words
    kv          the keys of a table that describe its KV
    path        where the cache keeps its table
    core_share  share of the wall time that the core spent on this process; None unless it was one core and vLLM
    """

    points: list[MeasuredPoint]
    of: str
    kv: dict[str, Any]
    path: Path
    wall_s: float
    core_share: float | None


def _measured(config: Config, quick: bool, rounds: int, cpu_time: bool) -> MeasuredEngine:
    from tetri.control_groups import threads
    from tetri.proc import build, measured_cost
    from tetri.proc.cpus import few_threads, pin
    from tetri.profile.measure import measure
    from tetri.profile.scenes import scenes

    pin(config.workers[0].cpus)
    cores = threads()
    if config.engine.kind == "vllm" and (few := few_threads()) is not None:
        terminal.tell(few)
    if cpu_time and (cores > 1 or config.engine.kind != "vllm"):
        # CPU time equals the time of a free core only if one thread does all the work of a step.
        raise click.UsageError("--cpu-time is for vLLM on one core: give it with --cpus N")
    clock = time.process_time if cpu_time else time.perf_counter
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))  # vLLM logs to stdout
        terminal.tell(f"starting the {config.engine.kind} engine")
        engine = build.engine(config)
        stack.callback(engine.close)
        progress = stack.enter_context(_progress(rounds))
        wanted = scenes(engine.capacity, quick)
        begin, work = time.perf_counter(), time.process_time()
        points = measure(engine, wanted, rounds, clock, Random(0), progress)
        wall_s, work_s = time.perf_counter() - begin, time.process_time() - work
        share = work_s / wall_s if cores == 1 and config.engine.kind == "vllm" and not cpu_time else None
        of, kept_as = measured_cost.described(engine, config), measured_cost.path_of(engine, config)
        return MeasuredEngine(points, of, measured_cost.kv_of(engine), kept_as, wall_s, share)


def _command(given: Mapping[str, Any]) -> str:
    """A line with the command that repeats this measurement."""
    arguments = ["tetri-cli", "profile"]
    arguments += [argument for override in given["overrides"] for argument in ("--set", override)]
    arguments += [f"--{flag.replace('_', '-')}" for flag in ("quick", "cpu_time", "keep") if given[flag]]
    for name in ("conf", "rounds", "cpus", "out"):
        arguments += [] if given[name] is None else [f"--{name}", str(given[name])]
    return f"Made by: {shlex.join(arguments)}"


@contextlib.contextmanager
def _progress(rounds: int) -> Iterator[Callable[[int, int], None]]:
    """Show progress on stderr: a bar on a terminal, else a line after each round."""
    if not sys.stderr.isatty():

        def report(done: int, total: int) -> None:
            if not done * rounds % total:
                terminal.tell(f"round {done * rounds // total} of {rounds} measured")

        yield report
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("measuring", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _summary(made: Fit, measured: MeasuredEngine) -> list[str]:
    """How well the table fits, in lines for its header and for the terminal."""
    lines = []
    for name, found in made.quality.items():
        error = f"error {found.mean:.1%} on average, {found.worst:.1%} at worst"
        lines.append(f"{name}: {found.points} points, {error}, R^2 {found.r2:.4f}")
    lines.append(f"repeated steps differed by {made.spread:.1%} from their median, in the mean of all points")
    if (share := measured.core_share) is not None and share < BUSY_SHARE:
        lines.append(f"others were at work on this core: it was ours for {share:.0%} of the time; measure again")
    return [*lines, *(f"note: {note}" for note in made.notes)]


def _shown(table: Cost, made: Fit, measured: MeasuredEngine) -> list[str]:
    lines = [table.source, "", f"{'chunk':>8} {'ms':>9} {'tokens/s':>9}"]
    for tokens, seconds in table.prefill:
        mark = "  the knee" if tokens == table.chunk_tokens else ""
        lines.append(f"{tokens:8.0f} {seconds * 1e3:9.2f} {tokens / seconds:9.0f}{mark}")
    lines += ["", f"{'batch':>8} {'ms':>9}"]
    lines += [f"{batch:8.0f} {seconds * 1e3:9.2f}" for batch, seconds in table.decode]
    start, context, chunk = table.prefill_start_s, table.decode_context_s, table.chunk_tokens
    after = f"a chunk of {chunk} after as many tokens: {start * chunk**2 * 1e3:+.2f} ms"
    lines += ["", f"prefill_start_s   {start:.3g}  ({after})"]
    lines += [f"decode_context_s  {context:.3g}  (1,000 tokens of context: {context * 1e6:+.2f} ms)"]
    lines += [f"chunk_tokens      {chunk}  (proposed: the smallest chunk at 95 % of the best rate)", ""]
    return lines + _summary(made, measured)


def _as_json(table: Cost, made: Fit, measured: MeasuredEngine) -> dict[str, Any]:
    from tetri.profile.fit import kind_of, predicted

    points = []
    for point in sorted(measured.points, key=lambda point: (kind_of(point), dataclasses.astuple(point.what))):
        made_of = {"kind": kind_of(point), **dataclasses.asdict(point.what)}
        times = {"seconds": point.seconds, "predicted_s": predicted(table, point), "spread": point.spread}
        points.append({**made_of, **times, "times": point.times, "held_out": point.held_out})
    return {
        "cost": dataclasses.asdict(table),
        "quality": {name: dataclasses.asdict(found) for name, found in made.quality.items()},
        "spread": made.spread,
        "notes": list(made.notes),
        "points": points,
        "run": {"wall_s": measured.wall_s, "core_share": measured.core_share},
    }
