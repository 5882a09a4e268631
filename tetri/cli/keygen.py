"""tetri-cli keygen"""

from __future__ import annotations

import click


@click.command("keygen")
@click.argument("file", type=click.Path(dir_okay=False))
def command(file: str) -> None:
    """Make the key of a deployment over several hosts, in FILE, which must not exist. Copy it to every host, by a way
    that nobody can listen to, and set cluster.key."""
    from tetri.net.errors import NetError
    from tetri.net.keys import generate

    try:
        generate(file)
    except NetError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"{file}: a new key, for its owner alone (0600)", err=True)
