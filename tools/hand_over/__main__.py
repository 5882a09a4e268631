"""How long after the end of a prompt's prefill its first decode step begins, for a short and a long prompt, on an idle
decode worker and beside a running batch; and whether the copies of a long prompt overlap with its prefill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

import click
from drive import BenchError, Cluster, Group, Load, run
from picture import drawing
from stages import Move, moves, overlap

from tetri.bench.plots import PlotError
from tetri.client import TetriError
from tetri.config import Config, default_path, load
from tetri.models import ModelError
from tetri.proc.launch import LaunchError
from tetri.proc.recorder import RecordError
from tetri.strict import ConfigError

EXPECTED = (BenchError, ConfigError, LaunchError, ModelError, PlotError, RecordError, TetriError)
LIMIT_MS = 15.0  # by which the long prompt's first decode step may come later than the short one's


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=20, show_default=True, help="Of each length and load.")
@click.option("--short", type=click.IntRange(1), default=256, show_default=True, help="Tokens of the short prompts.")
@click.option("--long", type=click.IntRange(2), default=4000, show_default=True, help="Tokens of the long prompts.")
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True, help="Requests that decode beside.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw one long prompt's way, a PNG.")
@click.option("--conf", type=click.Path(dir_okay=False, path_type=Path), help="Configuration to measure.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="One object on stdout.")
def main(
    rounds: int,
    short: int,
    long: int,
    batch: int,
    plot: Path | None,
    conf: Path | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Measure the hand-over from a prefill to a decode worker, stage by stage. Takes some minutes and wants a machine
    on which nothing else runs."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started is stopped again
    folder = Path(tempfile.mkdtemp(prefix="tetri-", dir="/tmp"))  # Unix sockets need a short path
    try:
        if short >= long:
            raise BenchError(f"--short ({short}) must be less than --long ({long})")
        draw = drawing() if plot else None
        config = configure(conf or default_path(), overrides, folder)
        with closing(Cluster(config, say)) as cluster:
            groups = run(cluster, Load((short, long), rounds, batch), say)
            found = moves(cluster.record(cluster.prefill), cluster.record(cluster.decode))
        by_group = grouped(found, groups)
        if draw and plot:
            draw(plot, typical(by_group["idle", long]))
    except EXPECTED as error:
        click.echo(f"bench_handover: {error}", err=True)
        sys.exit(1)
    finally:
        shutil.rmtree(folder)
    summary = summarised(by_group, short, long, batch)
    click.echo(json.dumps(summary) if as_json else table(summary))


def configure(conf: Path, overrides: tuple[str, ...], folder: Path) -> Config:
    own = [f"cluster.run_dir={folder}", f"cluster.name=h{os.getpid()}", "cluster.record=true"]
    return load(conf, [*own, *overrides])


def grouped(found: Sequence[Move], groups: dict[Group, list[str]]) -> dict[Group, list[Move]]:
    """Raises BenchError when a request's way is not wholly in the records."""
    by_rid = {move.rid: move for move in found}
    missing = [rid for rids in groups.values() for rid in rids if rid not in by_rid]
    if missing:
        raise BenchError(f"the records do not show how {len(missing)} requests were handed over, {missing[0]} for one")
    return {group: [by_rid[rid] for rid in rids] for group, rids in groups.items()}


def typical(taken: Sequence[Move]) -> Move:
    """The one in the middle."""
    return sorted(taken, key=lambda move: move.seconds)[len(taken) // 2]


def summarised(by_group: dict[Group, list[Move]], short: int, long: int, batch: int) -> dict[str, Any]:
    """`difference_ms`: how much later the long prompt's first decode step comes than that of a short prompt on an idle
    decode worker, medians; `limit_ms`: how much it may."""
    loads: dict[str, Any] = {}
    base = _ms(move.seconds for move in by_group["idle", short])
    for state in ("idle", "busy"):
        taken = [move for length in (short, long) for move in by_group[state, length]]
        step = _ms(move.first_step.ended - move.first_step.begun for move in taken)
        lengths = {str(length): _lengths(by_group[state, length]) for length in (short, long)}
        loads[state] = {
            "lengths": lengths,
            "step_ms": step,
            "difference_ms": lengths[str(long)]["median_ms"] - base,
            "limit_ms": LIMIT_MS if state == "idle" else LIMIT_MS + step,
        }
    seen = {state: overlap(by_group[state, long]) for state in ("idle", "busy")}
    return {
        "short": short,
        "long": long,
        "batch": batch,
        "rounds": len(by_group["idle", long]),
        **loads,
        "overlap": {
            "chunks": seen["idle"].chunks,
            "inside": seen["idle"].inside,
            "early_ms": _ms(seen["idle"].early_s) if seen["idle"].early_s else None,
            "busy": {"chunks": seen["busy"].chunks, "inside": seen["busy"].inside},
        },
    }


def _lengths(taken: Sequence[Move]) -> dict[str, Any]:
    stages = [move.stages() for move in taken]
    return {
        "median_ms": _ms(move.seconds for move in taken),
        "max_ms": 1000 * max(move.seconds for move in taken),
        "stages_ms": {name: _ms(stage[name] for stage in stages) for name in stages[0]},
        "samples_ms": [1000 * move.seconds for move in taken],
    }


def _ms(seconds: Any) -> float:
    return 1000 * median(seconds)


def table(found: dict[str, Any]) -> str:
    names = list(found["idle"]["lengths"][str(found["short"])]["stages_ms"])
    lines = [f"{'decode worker':15}{'prompt':>8}{'median':>9}{'max':>9}   of it, medians in ms: {', '.join(names)}"]
    for state in ("idle", "busy"):
        for length, taken in found[state]["lengths"].items():
            parts = "".join(f"{taken['stages_ms'][name]:>8.1f}" for name in names)
            lines.append(f"{state:15}{length:>8}{taken['median_ms']:>6.1f} ms{taken['max_ms']:>6.1f} ms   {parts}")
    for state, what in (("idle", "idle"), ("busy", f"beside {found['batch']} decodes")):
        taken = found[state]
        lines.append(
            f"{found['long']} tokens, {what}: {taken['difference_ms']:+.1f} ms against {found['short']} tokens, idle"
            f" (at most {taken['limit_ms']:.1f} wanted; a decode step takes {taken['step_ms']:.1f})"
        )
    seen = found["overlap"]
    lines.append(
        f"copies inside the next chunk's forward pass: {seen['inside']} of {seen['chunks']} (idle),"
        f" {seen['busy']['inside']} of {seen['busy']['chunks']} (busy)"
    )
    return "\n".join(lines)


def say(text: str) -> None:
    click.echo(text, err=True)


if __name__ == "__main__":
    main(prog_name="bench_handover")
