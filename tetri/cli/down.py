"""tetri-cli down: stops a deployment."""

from __future__ import annotations

from pathlib import Path

import click

from tetri import terminal
from tetri.cli.options import Overrides, deployment_options, examples, run_dir_of


@click.command("down", epilog=examples("tetri-cli down"))
@deployment_options
def command(conf: Path | None, overrides: Overrides) -> None:
    """Stop everything that `up` started. Only logs and records stay."""
    from tetri.proc import launch

    run_dir = run_dir_of(conf, overrides)
    stopped = launch.down(run_dir, terminal.tell)
    terminal.tell("stopped" if stopped else f"nothing is up in {run_dir}")
