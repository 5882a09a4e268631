"""bench_handover: measure the time from the end of a prompt's prefill to its first decode step, for short and long
prompts, on an idle and a busy decode worker; and whether the KV copies of a long prompt overlap with its prefill."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click

from tetri.bench.deployment import EXPECTED, SPLIT, configured, own_folder
from tetri.bench.handover.drive import Group, Load, cluster, run
from tetri.bench.handover.picture import draw
from tetri.bench.handover.stages import Move, moves, overlap
from tetri.bench.report import (
    BenchError,
    Program,
    as_json,
    give,
    one_line,
    overrides,
    progress,
    split_conf,
    spread,
    table,
)
from tetri.paths import OUT_PLOT
from tetri.proc.recorder import RecordError

LIMIT_MS = 15.0  # the most by which the long prompt's hand-over may take longer than the short one's


@click.command(cls=Program)
@click.option(
    "--rounds", type=click.IntRange(1), default=20, show_default=True, help="Requests for each length and load."
)
@click.option("--short", type=click.IntRange(1), default=256, show_default=True, help="Tokens of the short prompts.")
@click.option("--long", type=click.IntRange(2), default=4000, show_default=True, help="Tokens of the long prompts.")
@click.option(
    "--batch", type=click.IntRange(1), default=16, show_default=True, help="Decode requests on the busy worker."
)
@click.option("--plot", type=OUT_PLOT, help="Write a PNG of one long prompt's hand-over.")
@split_conf
@overrides
@as_json
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
    """Measure the hand-over from a prefill to a decode worker, stage by stage. Takes some minutes and needs an idle
    machine."""
    with one_line("bench_handover", *EXPECTED, RecordError), own_folder("handover") as folder:
        if short >= long:
            raise BenchError(f"--short ({short}) must be less than --long ({long})")
        config = configured(conf or SPLIT, folder, "handover", ["cluster.record=true", *overrides])
        with cluster(config, progress) as live:
            groups = run(live, Load((short, long), rounds, batch), progress)
            found = moves(live.record(live.prefill), live.record(live.decode))
        by_group = grouped(found, groups)
    summary = summarised(by_group, short, long, batch)
    give(summary, shown(summary), as_json)
    if plot:
        draw(plot, typical(by_group["idle", long]))


def grouped(found: Sequence[Move], groups: dict[Group, list[str]]) -> dict[Group, list[Move]]:
    """Return the hand-overs by group. Raises BenchError if the records lack a request."""
    by_rid = {move.rid: move for move in found}
    missing = [rid for rids in groups.values() for rid in rids if rid not in by_rid]
    if missing:
        raise BenchError(f"the records lack the hand-over of {len(missing)} requests, such as {missing[0]}")
    return {group: [by_rid[rid] for rid in rids] for group, rids in groups.items()}


def typical(samples: Sequence[Move]) -> Move:
    """Return the hand-over of median duration."""
    return sorted(samples, key=lambda move: move.seconds)[len(samples) // 2]


def summarised(by_group: dict[Group, list[Move]], short: int, long: int, batch: int) -> dict[str, Any]:
    """Return the results for JSON. `difference_ms`: median hand-over time of the long prompts minus that of the short
    prompts on an idle decode worker; `limit_ms`: its limit."""
    loads: dict[str, Any] = {}
    base = _ms(move.seconds for move in by_group["idle", short])
    for state in ("idle", "busy"):
        samples = [move for length in (short, long) for move in by_group[state, length]]
        step = _ms(move.first_step.ended - move.first_step.begun for move in samples)
        lengths = {str(length): _lengths(by_group[state, length]) for length in (short, long)}
        difference = lengths[str(long)]["ms"]["median"] - base
        limit = LIMIT_MS if state == "idle" else LIMIT_MS + step
        loads[state] = {
            "lengths": lengths,
            "step_ms": step,
            "difference_ms": difference,
            "limit_ms": limit,
            "ok": difference <= limit,
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


def _lengths(samples: Sequence[Move]) -> dict[str, Any]:
    stages = [move.stages() for move in samples]
    return {
        "ms": spread((move.seconds for move in samples), 1000),
        "stages_ms": {name: _ms(stage[name] for stage in stages) for name in stages[0]},
        "samples_ms": [1000 * move.seconds for move in samples],
    }


def _ms(seconds: Iterable[float]) -> float:
    return 1000 * median(seconds)


def shown(found: dict[str, Any]) -> str:
    """Format the results as text."""
    names = list(found["idle"]["lengths"][str(found["short"])]["stages_ms"])
    rows = []
    for state in ("idle", "busy"):
        for length, samples in found[state]["lengths"].items():
            times = [samples["ms"]["median"], samples["ms"]["worst"], *(samples["stages_ms"][name] for name in names)]
            rows.append([state, length, *(f"{time:.1f}" for time in times)])
    lines = [table(("decode worker", "prompt", "median ms", "worst ms", *names), rows)]
    for state, what in (("idle", "idle"), ("busy", f"beside {found['batch']} decodes")):
        samples = found[state]
        lines.append(
            f"{found['long']} tokens, {what}: {samples['difference_ms']:+.1f} ms against {found['short']} tokens, idle"
            f" (limit {samples['limit_ms']:.1f}; a decode step takes {samples['step_ms']:.1f})"
        )
    seen = found["overlap"]
    lines.append(
        f"copies inside the next chunk's forward pass: {seen['inside']} of {seen['chunks']} (idle),"
        f" {seen['busy']['inside']} of {seen['busy']['chunks']} (busy)"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main(prog_name="bench_handover")
