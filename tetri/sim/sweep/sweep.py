"""Run a sweep in several processes.

Each task explores a case, or the fixed arrangements of the cases that share their runs, with the results that the file
has. The fixed arrangements come first, then auto from few instances to many: what it reaches with few says where to
look with more.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import groupby
from pathlib import Path
from typing import TypeVar

from tetri.sim.sweep.cases import Case
from tetri.sim.sweep.explore import Explorer, Standing, best
from tetri.sim.sweep.report import Row
from tetri.sim.sweep.results import Result
from tetri.sim.sweep.store import Store

Argument = TypeVar("Argument")
Value = TypeVar("Value")
Fixed = dict[Case, list[Standing]]


def sweep(
    cases: Sequence[Case], path: Path, processes: int, progress: Callable[[int], None] = lambda _: None
) -> list[Row]:
    """Explore the cases, and keep the results in a file. `progress` is called with the number of finished parts, of two
    for each case. Raises StoreError and SimError."""
    Store(path)  # raises an error here, once, instead of in every process
    cells = [[*group] for _, group in groupby(cases, key=lambda case: case.cell)]
    rows: dict[Case, Row] = {}
    fixed: Fixed = {}
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        tasks = [(path, cell) for cell in sorted(cells, key=_size, reverse=True)]
        for _, found in _each(pool, _fixed, tasks):
            fixed |= found
            progress(len(fixed))
        for _, group in groupby(sorted(cases, key=lambda case: case.instances), key=lambda case: case.instances):
            starts = [(path, case, _start(case, fixed[case], rows), best(fixed[case]).near) for case in group]
            for (_, case, _, _), auto in _each(pool, _automatic, starts):
                rows[case] = Row(case, fixed[case], auto)
                progress(len(fixed) + len(rows))
    return [rows[case] for case in cases]


def _size(cell: Sequence[Case]) -> int:
    return cell[0].requests * len(cell)


def _start(case: Case, fixed: Iterable[Standing], rows: dict[Case, Row]) -> float:
    """Where the goodput of auto may be: with as many more instances, as much better than the best fixed arrangement."""
    like = (case.workload, case.cost, case.regime)
    fewer = [row for of, row in rows.items() if (of.workload, of.cost, of.regime) == like]
    ratio = max(fewer, key=lambda row: row.case.instances).ratio if fewer else 1.0
    return (best(fixed).goodput or 0.0) * ratio


def _each(
    pool: ProcessPoolExecutor, task: Callable[[Argument], Value], arguments: Iterable[Argument]
) -> Iterator[tuple[Argument, Value]]:
    """Run a task for each argument; yield both as they end."""
    pending = {pool.submit(task, argument): argument for argument in arguments}
    for future in as_completed(pending):
        yield pending[future], future.result()


def _fixed(task: tuple[Path, Sequence[Case]]) -> Fixed:
    path, cases = task
    store, runs = Store(path), -1
    while len(store) > runs:  # a run for one regime may be nearer to the goodput of another
        runs = len(store)
        found = {case: Explorer(case, store).fixed() for case in cases}
    return found


def _automatic(task: tuple[Path, Case, float, Result | None]) -> Standing:
    path, case, start, rival = task
    return Explorer(case, Store(path)).automatic(start, rival)
