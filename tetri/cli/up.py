"""tetri-cli up: starts a deployment."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tetri import terminal
from tetri.cli.options import Overrides, deployment_options, examples, seconds_option
from tetri.request import ROLES

if TYPE_CHECKING:
    from tetri.config import Config


@click.command(
    "up",
    epilog=examples(
        "tetri-cli up",
        "tetri-cli up --conf conf/split.toml                           # the phases on separate workers",
        "tetri-cli up --conf conf/emulated.toml --set gateway.port=0   # needs no model",
    ),
)
@deployment_options
@seconds_option("--wait", "wait_s", default=600.0, help="Give up when the deployment is not ready in time.")
@click.option("--foreground", is_flag=True, help="Stay, print all logs, and stop the deployment on SIGTERM or Ctrl-C.")
def command(conf: Path | None, overrides: Overrides, wait_s: float, foreground: bool) -> None:
    """Start the broker, the monitor and all workers, and wait until they are ready."""
    from tetri.config import default_path, load

    config = load(conf or default_path(), overrides)
    if foreground:
        from tetri.proc.foreground import run

        run(config, terminal.tell, wait_s, lambda run_dir: _summary(config, run_dir))
        return
    from tetri.proc import launch

    with _progress() as report:
        run_dir = launch.up(config, report, wait_s)
    for line in _summary(config, run_dir):
        click.echo(line)


def _summary(config: Config, run_dir: Path) -> list[str]:
    from tetri.proc import gateways

    roles = [worker.role for worker in config.workers]
    model = config.model.name if config.engine.kind == "vllm" else "an emulated model"
    counts = [f"{roles.count(role)} {role}" for role in ROLES if role in roles]
    urls = [*gateways.urls(run_dir).values()]
    http = [f"http     {url}/v1" for url in urls] + [f"page     {url}" for url in urls[:1]]
    workers = " and ".join(", ".join(counts).rsplit(", ", 1))
    return [
        f"up: {model} on {workers} workers",
        f"clients  {config.clients_address}",
        *http,
        f"logs     {run_dir}/log",
        "try      bin/tetri-cli submit 'The capital of France is'   bin/tetri-cli top   bin/tetri-cli down",
    ]


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Report progress on stderr: with a spinner on a terminal, else as plain lines."""
    if not sys.stderr.isatty():
        yield terminal.tell
        return
    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=True, highlight=False)
    plain = console.options.ascii_only  # no other characters in the terminal's encoding
    with console.status("starting", spinner="line" if plain else "dots") as spinner:

        def report(text: str) -> None:
            console.print(f"[green]{'-' if plain else '·'}[/] {escape(text)}")
            spinner.update("stopping" if text == "stopping" else "waiting for the workers")

        yield report
