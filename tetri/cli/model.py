"""tetri-cli model: prepares models on this machine."""

from __future__ import annotations

import click

from tetri import terminal
from tetri.cli.options import examples


@click.group("model")
def command() -> None:
    """Manage the models on this machine."""


@command.command("fetch", epilog=examples("tetri-cli model fetch", "tetri-cli model fetch smollm2-135m"))
@click.argument("name", required=False)
def fetch(name: str | None) -> None:
    """Prepare the model NAME (default: the configuration's default model) and print its folder."""
    from tetri import models
    from tetri.config import ModelConfig

    name = name or ModelConfig().name
    if name in models.KNOWN:
        terminal.tell(f"preparing {name}")
    click.echo(models.fetch(name))
