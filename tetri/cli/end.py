"""tetri-cli end: ends a request of any client."""

from __future__ import annotations

from pathlib import Path

import click

from tetri.cli.options import TEXT, Overrides, deployment_options, examples, operate, timeout_option


@click.command("end", epilog=examples("tetri-cli end 5f2c9a1e03b7d8460c1d2e3f4a5b6c7d"))
@click.argument("rid", type=TEXT)
@deployment_options
@timeout_option
def command(rid: str, conf: Path | None, overrides: Overrides, timeout: float) -> None:
    """End request RID, as if its client had cancelled it."""
    with operate(conf, timeout, overrides) as operator:
        operator.end(rid)
    click.echo(f"{rid} has ended")
