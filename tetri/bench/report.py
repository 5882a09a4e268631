"""Reporting for all benchmarks, with one set of names.

    median, p99, worst, mean   of the measured values; `worst` is the largest
    low, high                  the 95 % interval of the value beside them
    ratio                      the measured value divided by the baseline of the same rounds
    percent                    the relative increase over the baseline
    rounds, seeds              the number of measurements
    limit, ok                  the largest allowed value; whether all limits are met
    run                        values that differ between runs with the same arguments, such as wall-clock seconds

A key ends with its unit, which also applies to the values in it: `step_ms: {median, p99, worst}` are milliseconds.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import sqrt
from statistics import fmean, stdev
from typing import Any, TextIO

import click

from tetri import terminal
from tetri.metrics import summarise
from tetri.paths import FILE

#: Student's t, two-sided 95 %, by degrees of freedom
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
       2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045)  # fmt: skip

Progress = Callable[[str], None]
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
conf = click.option(
    "--conf", type=FILE, help="Configuration file to measure (default: $TETRI_CONF, else conf/default.toml)."
)
split_conf = click.option("--conf", type=FILE, help="Configuration file to measure (default: conf/split.toml).")
overrides = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting; may be repeated."
)


class Program(click.Command):
    """The command of a program of its own. See tetri.terminal.program."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run the program and end it with SystemExit."""
        with terminal.program(str(extra.get("prog_name", self.name))):
            return super().main(*args, **extra)


class BenchError(RuntimeError):
    """The benchmark cannot continue; one line with the reason."""


def spread(values: Iterable[float], scale: float = 1.0, digits: int | None = None) -> dict[str, float]:
    """Return median, p99 and worst of the values, times `scale`. Raises ValueError without values."""
    found = summarise(values)
    named = {"median": scale * found.p50, "p99": scale * found.p99, "worst": scale * found.most}
    return named if digits is None else {name: round(value, digits) for name, value in named.items()}


def interval(values: Sequence[float]) -> dict[str, float]:
    """Return the mean of at least two values and its 95 % interval (Student's t)."""
    mean, freedom = fmean(values), len(values) - 1
    t = T95[freedom - 1] if freedom <= len(T95) else 1.96 * (1 + 0.71 / freedom)
    half = t * stdev(values) / sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a table. Columns that have a number are aligned to the right, others to the left."""
    lines = [tuple(head), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    named = [not any(cell[:1] in "+-.0123456789" for cell in column[1:] if cell) for column in zip(*lines, strict=True)]

    def shown(line: Sequence[str]) -> str:
        cells = zip(line, widths, named, strict=True)
        return "  ".join(cell.ljust(width) if left else cell.rjust(width) for cell, width, left in cells).rstrip()

    return "\n".join(map(shown, lines))


def records(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format objects as a table with their keys as the head."""
    head = list(dict.fromkeys(name for row in rows for name in row))
    return table(head, [[str(row.get(name, "")) for name in head] for row in rows])


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a table in Markdown."""
    lines = [head, *rows]
    made = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([made[0], "|---" * len(head) + "|", *made[1:]])


def give(found: Mapping[str, Any], text: str, as_json: bool, out: TextIO | None = None) -> None:
    """Print the result: `found` as one JSON object if `as_json`, else `text`. To `out`, by default stdout."""
    terminal.print_json(found, out) if as_json else click.echo(text, file=out)


def progress(text: str) -> None:
    """Print a line of progress on stderr."""
    terminal.tell(text)


@contextmanager
def one_line(program: str, *errors: type[Exception], status: int = 1) -> Iterator[None]:
    """On these errors and BenchError, end the program with one line on stderr and this exit status."""
    expected: tuple[type[Exception], ...] = (BenchError, *errors)
    try:
        yield
    except expected as error:
        terminal.tell(f"{program}: {error}")
        sys.exit(status)


def own_stdout() -> TextIO:
    """Return a stream for results; from now on other output to stdout, such as vLLM's log, goes to stderr."""
    out = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors="backslashreplace")
    os.dup2(2, 1)
    return out
