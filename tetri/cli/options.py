"""Options that several commands share, and what they resolve to."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from tetri.paths import FILE


class Text(click.types.StringParamType):
    """Text that leaves this process, and so has to be Unicode."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the text. Raises UsageError."""
        return decoded(super().convert(value, param, ctx), param.get_error_hint(ctx) if param else "the text")


TEXT = Text()
COUNT = click.IntRange(1)
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
Overrides = tuple[str, ...]

conf_option: Decorator = click.option(
    "--conf", type=FILE, help="Configuration of the deployment (default: $TETRI_CONF, else conf/default.toml)."
)
set_option: Decorator = click.option(
    "--set", "overrides", type=TEXT, multiple=True, metavar="KEY=VALUE", help="Override a setting; may be repeated."
)
json_option: Decorator = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")


def seconds_option(*names: str, default: float, help: str | None = None) -> Decorator:
    """An option that takes a positive number of seconds."""
    positive = click.FloatRange(0, min_open=True)
    return click.option(*names, type=positive, default=default, show_default=True, metavar="SECONDS", help=help)


timeout_option = seconds_option("--timeout", default=30.0, help="Give up when the broker is silent for longer.")


def examples(*lines: str) -> str:
    """The epilog of a command: command lines as they are typed, each with a comment if it needs one."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])


def deployment_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options --conf and --set, which select the deployment."""
    return conf_option(set_option(function))


def sampling_options(max_tokens: int) -> Decorator:
    """Options named as the fields of tetri.request.Sampling. An option that is not given is None."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in (
            click.option("--stop", type=TEXT, multiple=True, help="End before this text; may be repeated."),
            click.option("--seed", type=int, help="Seed; makes sampling repeatable."),
            click.option("--min-p", type=float, help="Minimum probability, relative to the likeliest token."),
            click.option("--top-k", type=int, help="Sample from the K likeliest tokens; 0: all."),
            click.option("--top-p", type=float, help="Sample from the likeliest tokens with this total probability."),
            click.option("--temperature", type=float, help="Sampling temperature; 0: greedy."),
            click.option(
                "--max-tokens", type=int, help=f"Maximum output tokens (default: {max_tokens}, or as many as fit)."
            ),
        ):
            function = option(function)
        return function

    return decorate


def decoded(text: str, what: str) -> str:
    """Text of the operating system, as UTF-8 where the locale does not explain its bytes. Raises UsageError."""
    if not any("\ud800" <= char <= "\udfff" for char in text):
        return text
    try:
        return os.fsencode(text).decode()
    except UnicodeError:
        raise click.UsageError(f"{what} is not UTF-8") from None


def stdin_text(data: bytes) -> str:
    """Decode what was read from standard input, without its last newline: UTF-8, but what a terminal sends is in the
    terminal's encoding. Raises UsageError."""
    encoding = sys.stdin.encoding if sys.stdin.isatty() else "utf-8"
    try:
        return data.decode(encoding).removesuffix("\n")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"standard input is not {encoding.upper()} (byte {error.start})") from None


def run_dir_of(conf: Path | None, overrides: Sequence[str] = ()) -> Path:
    """Run directory of the deployment that --conf and --set select, else of the environment's. Raises ConfigError."""
    from tetri.config import default_path, default_run_dir, load

    named = conf or os.environ.get("TETRI_CONF")
    if not named and not overrides:
        return default_run_dir()
    return load(named or default_path(), overrides).run_dir


def connect(conf: Path | None, timeout: float, overrides: Sequence[str] = ()) -> Any:
    """A Client of the selected deployment. Raises ConfigError, and Unreachable when it is not up."""
    from tetri.client import Client
    from tetri.client.place import address_in

    return Client(address_in(run_dir_of(conf, overrides)), timeout)


def operate(conf: Path | None, timeout: float, overrides: Sequence[str] = ()) -> Any:
    """An Operator of the selected deployment. Raises as `connect`."""
    from tetri.client import Operator
    from tetri.client.place import address_in

    return Operator(address_in(run_dir_of(conf, overrides), "operators"), timeout)
