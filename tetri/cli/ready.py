"""tetri-cli ready: whether KV moves between all instances."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from tetri import terminal
from tetri.cli.options import Overrides, connect, deployment_options, examples, json_option, seconds_option

_PAUSE_S = 0.2  # a canary takes about as long


@click.command("ready", epilog=examples("tetri-cli ready --wait 10"))
@deployment_options
@click.option(
    "--wait",
    type=click.FloatRange(0),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help=("Wait so long for all to be ready: without traffic, one pair is tried each second."),
)
@seconds_option("--timeout", default=5.0, help="Give up when the broker is silent for longer.")
@json_option
def command(conf: Path | None, overrides: Overrides, wait: float, timeout: float, as_json: bool) -> int:
    """Show whether each pair of a prefill and a decode worker has lately carried KV. Exit status 1 if one has not."""
    end = time.monotonic() + wait
    with connect(conf, timeout, overrides) as client:
        found = client.readiness()
        while not found["ready"] and time.monotonic() < end:
            time.sleep(_PAUSE_S)
            found = client.readiness()
    if as_json:
        terminal.print_json(found)
    else:
        click.echo("ready" if found["ready"] else f"not ready: {found['why']}")
        for pair in found["pairs"]:
            click.echo(f"{pair['prefill']} to {pair['decode']}: {_shown(pair)}")
        if (more := found["in_service"] - len(found["pairs"])) > 0:
            click.echo(f"{more} more pairs")
    return 0 if found["ready"] else 1


def _shown(pair: dict[str, Any]) -> str:
    age = "" if pair["age_s"] is None else f" {pair['age_s']:.1f} s ago"
    return f"{pair['state']}: {pair['why']}" if pair["why"] else f"{pair['state']}{age}"
