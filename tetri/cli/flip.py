"""tetri-cli flip: changes the role of a worker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tetri import terminal
from tetri.cli.options import TEXT, Overrides, deployment_options, examples, json_option, operate, timeout_option
from tetri.request import ROLES


@click.command("flip", epilog=examples("tetri-cli flip w0 prefill", "tetri-cli flip w0 auto   # and back"))
@click.argument("iid", type=TEXT)
@click.argument("role", type=click.Choice(ROLES), metavar="ROLE")
@json_option
@deployment_options
@timeout_option
def command(iid: str, role: str, as_json: bool, conf: Path | None, overrides: Overrides, timeout: float) -> None:
    """Change the role of worker IID: prefill, decode, mixed (both) or auto (both,
    as far apart as the traffic asks).

    The role decides which new work the worker gets. It finishes the work that it has; its engine keeps running. The
    last worker that can prefill or decode cannot lose that role. With a policy other than "none" in [monitor], the
    monitor may flip the worker again later.
    """
    from tetri.client import RequestRefused

    with operate(conf, timeout, overrides) as operator:
        try:
            change = operator.flip(iid, role)
        except RequestRefused as error:
            if _unknown(operator, iid):
                raise click.UsageError(str(error)) from None
            raise
    made = f"{change['iid']}: {change['was']} -> {change['role']} in {1e3 * change['took_s']:.1f} ms"
    terminal.print_json(change) if as_json else click.echo(made)


def _unknown(operator: Any, iid: str) -> bool:
    """Whether the refusal is due to an unknown IID, which is a usage error."""
    return iid not in {instance["iid"] for instance in operator.status()["instances"]}
