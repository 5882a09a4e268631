"""tetri-cli sim sweep: compares arrangements of instances in the simulator."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from fnmatch import fnmatch
from functools import reduce
from pathlib import Path
from typing import Any

import click

from tetri import terminal
from tetri.cli.options import examples, json_option
from tetri.cli.sim import progress_bar
from tetri.paths import FILE, OUT_FILE, OUT_PLOT

HELD_BACK = {"without": (False,), "only": (True,), "with": (False, True)}
_EXAMPLES = examples(
    "tetri-cli sim sweep --case 'Mixed/*/balanced' --instances 2,4",
    "tetri-cli sim sweep --trace AzureLLMInferenceTrace_conv.csv --out sweep.jsonl --plot sweep.png",
)
OPTIONS = (
    click.option(
        "--case",
        "globs",
        multiple=True,
        metavar="GLOB",
        help="Cases with such a name only, as in 'Mixed/*' (workload/cost/instances/regime); may be repeated.",
    ),
    click.option("--instances", metavar="N,...", help="These numbers of instances only."),
    click.option("--trace", "traces", type=FILE, multiple=True, help="A trace as one more workload; may be repeated."),
    click.option(
        "--held-back",
        type=click.Choice([*HELD_BACK]),
        default="without",
        show_default=True,
        help="What to do with the third of the cases that judges a final policy.",
    ),
    click.option(
        "--requests",
        type=click.IntRange(0, 1_000_000),
        default=0,
        help="Requests of each run.  [default: 1000 an instance, at least 4000]",
    ),
    click.option("--jobs", "processes", type=click.IntRange(1, 256), default=2, show_default=True, help="Processes."),
    click.option("--out", type=OUT_FILE, help="Keep each run in this file, and use those that it has."),
    click.option("--plot", type=OUT_PLOT, help="Plot the goodputs to this PNG."),
)


def _listed(function: Callable[..., Any]) -> Callable[..., Any]:
    return reduce(lambda made, option: option(made), reversed(OPTIONS), function)


@click.command("sweep", epilog=_EXAMPLES)
@_listed
@json_option
def command(as_json: bool, plot: Path | None, **options: Any) -> None:
    """Compare arrangements of the same instances: coupled, split, auto.

    Finds for each case the goodput of each arrangement that can be the best: the highest rate at which 90 % of the
    requests keep the limits of TTFT and TPOT. Splits and auto are simulated with the live cores. The whole sweep takes
    about 45 minutes on two cores, 15 of them without 32 instances; with --out, an interrupted one goes on where it was.
    """
    from tetri.sim.sweep.report import as_json as plain
    from tetri.sim.sweep.report import checks

    rows = _swept(**options)
    groups = [[row for row in rows if row.case.held_back is held] for held in (False, True)]
    found = checks(groups[0] or groups[1], groups[1] if groups[0] else [])
    if as_json:
        terminal.print_json({"cases": [*map(plain, rows)], "checks": [check.as_json() for check in found]})
    else:
        click.echo("\n".join(_shown(groups, found)))
    if plot is not None:
        from tetri.bench.sweep_plot import draw

        draw(plot, [*map(plain, rows)])


def _swept(traces: Sequence[Path], requests: int, processes: int, out: Path | None, **chosen: Any) -> list[Any]:
    """The rows of the report. Raises UsageError."""
    from tetri.cost import CostError
    from tetri.sim.setup import SimError
    from tetri.sim.sweep.cases import cases
    from tetri.sim.sweep.store import StoreError
    from tetri.sim.sweep.sweep import sweep
    from tetri.sim.traces import TraceError

    with ExitStack() as stack:
        try:
            found = _chosen(cases(traces, requests), **chosen)
            if not traces:
                terminal.tell("tetri-cli: without a --trace there are no cases of recorded requests")
            if out is None:
                out = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "sweep.jsonl"
            progress = stack.enter_context(progress_bar(2 * len(found)))
            return sweep(found, out, processes, progress or (lambda _: None))
        except (CostError, SimError, StoreError, TraceError) as error:
            raise click.UsageError(str(error)) from None


def _chosen(cases: Sequence[Any], globs: Sequence[str], instances: str | None, held_back: str) -> list[Any]:
    """The cases that the options name. Raises UsageError."""
    known = {str(case.instances) for case in cases}
    counts = known if instances is None else {*instances.split(",")}
    if not counts <= known:
        raise click.UsageError(f"--instances must be of {', '.join(sorted(known, key=int))}, got {instances}")
    found = [
        case
        for case in cases
        if str(case.instances) in counts
        and case.held_back in HELD_BACK[held_back]
        and any(fnmatch(case.name, glob) for glob in globs or ("*",))
    ]
    if not found:
        raise click.UsageError("no case has such a name: see --case, --instances and --held-back")
    return found


def _shown(groups: Sequence[Sequence[Any]], found: Sequence[Any]) -> Iterator[str]:
    """The lines of the report; the cases that were held back are apart."""
    from tetri.sim.sweep.report import table, verdicts

    for title, rows in zip(("", "held back"), groups, strict=True):
        if rows:
            yield from (title, *table(rows)) if title else table(rows)
    yield from ("", *verdicts(found))
