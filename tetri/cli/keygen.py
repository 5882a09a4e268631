"""tetri-cli keygen: makes the key that encrypts KV between hosts."""

from __future__ import annotations

import click

from tetri import terminal
from tetri.cli.options import examples


@click.command("keygen", epilog=examples("tetri-cli keygen cluster.key"))
@click.argument("file", type=click.Path(dir_okay=False))
def command(file: str) -> None:
    """Write the key of a deployment over several hosts to FILE, which must not exist. Copy the file to every host over
    a secure channel, and set cluster.key to its path."""
    from tetri.net.errors import NetError
    from tetri.net.keys import generate

    try:
        generate(file)
    except NetError as error:
        raise click.ClickException(str(error)) from None
    terminal.tell(f"{file}: a new key, for its owner alone (0600)")
