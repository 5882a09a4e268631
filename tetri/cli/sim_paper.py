"""tetri-cli sim paper: repeats the paper's evaluation in the simulator."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from functools import cache
from itertools import groupby, product
from time import perf_counter
from typing import Any

import click

from tetri import terminal
from tetri.cli.options import examples, json_option
from tetri.cli.sim import progress_bar

WORKLOADS = ("LPLD", "LPHD", "HPLD", "HPHD", "Mixed")
MICRO_SEEDS = 5  # maximum seeds of the microbenchmarks
COST = "v100-opt13b"


@click.command("paper", epilog=examples("tetri-cli sim paper", "tetri-cli sim paper --seeds 3 --only LPHD"))
@click.option(
    "--seeds", type=click.IntRange(1, 1000), default=20, show_default=True, help="Random draws of each workload."
)
@click.option(
    "--only",
    type=click.Choice(WORKLOADS),
    multiple=True,
    help="Run this workload only, without microbenchmarks; may be repeated.",
)
@json_option
def command(seeds: int, only: tuple[str, ...], as_json: bool) -> None:
    """Repeat the paper's evaluation, and print each result beside the paper's.

    Runs five workloads on TetriInfer (one prefill and one decode instance) and on coupled baselines, then the
    microbenchmarks of Figures 3 to 5, 16, 18 and 19. Takes about a minute. The same arguments give the same result to
    the last bit, except the object "run".
    """
    from tetri.cost import CostError
    from tetri.sim.setup import SimError
    from tetri.sim.workloads import WorkloadError

    started = perf_counter()
    try:
        made = evaluated(seeds, only or WORKLOADS, micro=not only)
    except (CostError, SimError, WorkloadError) as error:
        raise click.UsageError(str(error)) from None
    made["run"] = {"wall_s": perf_counter() - started}
    terminal.print_json(made) if as_json else click.echo("\n".join(shown(made)))


def evaluated(seeds: int, workloads: Sequence[str], micro: bool) -> dict[str, Any]:
    """The result as JSON data. Raises CostError, SimError and WorkloadError."""
    from tetri.sim.micro import cases
    from tetri.sim.paper import SYSTEMS, ratios, rows

    found = cases() if micro else []
    pairs = list(product(workloads, SYSTEMS))
    tasks: list[tuple[Any, ...]] = [(system, name, seed) for name, system in pairs for seed in range(seeds)]
    tasks += [(number, seed) for number in range(len(found)) for seed in range(min(seeds, MICRO_SEEDS))]
    results = dict(zip(tasks, _all(tasks), strict=True))
    runs = {(name, system): [results[system, name, seed] for seed in range(seeds)] for name, system in pairs}
    made: dict[str, Any] = {
        "seeds": seeds,
        "rows": [asdict(row) for row in rows(runs)],
        "ratios": [{**asdict(ratio), "off": ratio.off, "same_side": ratio.same_side} for ratio in ratios(runs)],
    }
    if micro:
        made["microbenchmarks"] = list(_points(results, min(seeds, MICRO_SEEDS)))
    return made


def _points(results: dict[tuple[Any, ...], Any], seeds: int) -> Iterator[dict[str, Any]]:
    from statistics import fmean

    from tetri.sim.interference import points
    from tetri.sim.micro import cases

    yield from (asdict(point) for point in points(_inputs()[1]))
    for number, case in enumerate(cases()):
        measured = [results[number, seed] for seed in range(seeds)]
        for what in measured[0]:
            value = fmean(each[what] for each in measured)
            paper = None if what else case.paper
            yield {"figure": case.figure, "point": f"{case.point} {what}".strip(), "value": value, "paper": paper}


# ---------------------------------------------------------------- runs, on every core


@cache
def _inputs() -> tuple[Any, Any]:
    from tetri import cost
    from tetri.sim import workloads

    return workloads.load(), cost.load(COST)


def _task(task: tuple[Any, ...]) -> Any:
    from tetri.sim import micro, paper

    evaluation, cost = _inputs()
    if len(task) == 2:
        number, seed = task
        return micro.cases()[number].run(evaluation, cost, seed)
    system, name, seed = task
    return paper.measure(system, evaluation, name, cost, seed)


def _all(tasks: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Run the tasks on all cores. Returns the results in the order of the tasks."""
    _inputs()  # raises an error here, once, instead of in every process
    cores = len(os.sched_getaffinity(0))
    with ExitStack() as stack:
        advance = stack.enter_context(progress_bar(len(tasks)))
        found: Iterator[Any] = map(_task, tasks)
        if cores > 1 and len(tasks) >= 20:
            pool = stack.enter_context(ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")))
            found = pool.map(_task, tasks, chunksize=2)
        results = []
        for result in found:
            results.append(result)
            if advance is not None:
                advance(len(results))
        return results


# ---------------------------------------------------------------- output


def shown(made: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the tables: the simulated value, and the paper's in brackets."""
    rows, metrics = made["rows"], list(dict.fromkeys(row["metric"] for row in made["rows"]))
    for workload in dict.fromkeys(row["workload"] for row in rows):
        yield f"{workload:15}" + "".join(f"{metric:>24}" for metric in metrics)
        for system in dict.fromkeys(row["system"] for row in rows):
            cells = {row["metric"]: row for row in rows if (row["workload"], row["system"]) == (workload, system)}
            yield f"  {system:13}" + "".join(f"{_cell(cells[metric]):>24}" for metric in metrics)
        yield ""
    yield "tetri-nvlink / vllm16"
    for ratio in made["ratios"]:
        side = "" if ratio["same_side"] else ", on the other side of 1"
        yield f"  {ratio['workload']:6}{ratio['metric']:12}{_cell(ratio):>18}{ratio['off']:+8.1%}{side}"
    for figure, points in groupby(made.get("microbenchmarks", ()), key=lambda point: point["figure"]):
        yield f"\n{figure}"
        yield from (f"  {point['point']:42}{_cell(point):>20}" for point in points)


def _cell(row: dict[str, Any]) -> str:
    paper = "" if row["paper"] is None else f" ({row['paper']:.4g})"
    return f"{row['value']:.4g}{paper}"
