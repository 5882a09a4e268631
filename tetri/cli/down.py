"""tetri-cli down: stops a deployment."""

from __future__ import annotations

from pathlib import Path

import click

from tetri.cli.options import conf_option, run_dir_of, set_option


@click.command("down")
@conf_option
@set_option
def command(conf: Path | None, overrides: tuple[str, ...]) -> None:
    """Stop everything that `up` started. Only logs and records stay."""
    from tetri.proc import launch

    run_dir = run_dir_of(conf, overrides)
    stopped = launch.down(run_dir, lambda text: click.echo(text, err=True))
    click.echo("stopped" if stopped else f"nothing is up in {run_dir}", err=True)
