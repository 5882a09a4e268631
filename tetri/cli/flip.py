"""tetri-cli flip"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from tetri.cli.options import conf_option, connect, set_option, timeout_option
from tetri.request import ROLES


@click.command("flip")
@click.argument("iid")
@click.argument("role", type=click.Choice(ROLES), metavar="ROLE")
@click.option("--json", "as_json", is_flag=True, help="One object on stdout.")
@conf_option
@set_option
@timeout_option
def command(iid: str, role: str, as_json: bool, conf: Path | None, overrides: tuple[str, ...], timeout: float) -> None:
    """Have worker IID take new work as ROLE: prefill, decode or mixed (both).

    What it has already it finishes beside the new; engine and weights stay. The last worker of a role is not
    flipped away from it. With a policy other than "none" in [monitor] the monitor may flip it again later.
    """
    from tetri.client import RequestRefused

    with connect(conf, timeout, overrides) as client:
        try:
            change = client.flip(iid, role)
        except RequestRefused as error:
            if _unknown(client, iid):
                raise click.UsageError(str(error)) from None
            raise
    if as_json:
        click.echo(json.dumps(change, ensure_ascii=False))
    else:
        click.echo(f"{change['iid']}: {change['was']} -> {change['role']} in {1e3 * change['took_s']:.1f} ms")


def _unknown(client: Any, iid: str) -> bool:
    """Whether it was refused for its name: no fault of the cluster's state."""
    return iid not in {instance["iid"] for instance in client.status()["instances"]}
