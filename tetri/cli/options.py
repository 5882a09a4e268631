"""Options that several commands share, and what they lead to."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

conf_option: Decorator = click.option(
    "--conf",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Configuration of the deployment (default: $TETRI_CONF).",
)
set_option: Decorator = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting; may be repeated."
)
timeout_option: Decorator = click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="How long the broker may stay silent.",
)


def sampling_options(max_tokens: int) -> Decorator:
    """Options named as the fields of tetri.request.Sampling; what is not given stays None."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in (
            click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be repeated."),
            click.option("--seed", type=int, help="Makes a drawn text repeatable."),
            click.option("--min-p", type=float, help="Least share of the likeliest token's probability."),
            click.option("--top-k", type=int, help="Draw from so many tokens only; 0: all."),
            click.option("--top-p", type=float, help="Draw from this much probability only."),
            click.option("--temperature", type=float, help="0: always the likeliest token."),
            click.option("--max-tokens", type=int, default=max_tokens, show_default=True, help="Longest answer."),
        ):
            function = option(function)
        return function

    return decorate


def utf8(data: bytes) -> str:
    """Text from standard input."""
    try:
        return data.decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"standard input is not UTF-8 (byte {error.start})") from None


def run_dir_of(conf: Path | None, overrides: Sequence[str] = ()) -> Path:
    """Where the deployment meant by --conf and --set, or else the environment, keeps its state. Raises
    ConfigError."""
    from tetri.config import default_path, default_run_dir, load

    named = conf or os.environ.get("TETRI_CONF")
    if not named and not overrides:
        return default_run_dir()
    return load(named or default_path(), overrides).run_dir


def connect(conf: Path | None, timeout: float, overrides: Sequence[str] = ()) -> Any:
    """A Client of that deployment. Raises Unreachable when nothing is up there."""
    from tetri.client import Client
    from tetri.client.place import address_in

    return Client(address_in(run_dir_of(conf, overrides)), timeout)
