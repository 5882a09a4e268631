"""tetri-cli openai-env: prints the environment in which OpenAI's clients talk to tetri."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import click

from tetri.cli.options import Overrides, deployment_options, examples, run_dir_of


@click.command("openai-env", epilog=examples('eval "$(tetri-cli openai-env)"'))
@deployment_options
def command(conf: Path | None, overrides: Overrides) -> None:
    """Print the two variables that OpenAI's clients read: eval "$(tetri-cli openai-env)"."""
    from tetri.client import Unreachable
    from tetri.proc import gateways
    from tetri.proc.gateway.keys import VARIABLE

    run_dir = run_dir_of(conf, overrides)
    urls = list(gateways.urls(run_dir).values())
    if not urls:
        raise Unreachable(f"no HTTP gateway is up in {run_dir}: run tetri-cli up, with gateway.count above 0")
    key = os.environ.get(VARIABLE) or "none"  # the clients refuse to start without one
    click.echo(f"export OPENAI_BASE_URL={shlex.quote(urls[0] + '/v1')}")
    click.echo(f"export OPENAI_API_KEY={shlex.quote(key)}")
