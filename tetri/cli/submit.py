"""tetri-cli submit: sends one request and shows its output."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from tetri.cli import FAILED, INTERRUPTED, OK
from tetri.cli.answer import play
from tetri.cli.options import (
    Overrides,
    connect,
    deployment_options,
    json_option,
    sampling_options,
    timeout_option,
    utf8,
)
from tetri.request import DEFAULT_TOKENS


@click.command("submit")
@click.argument("text")
@sampling_options(max_tokens=DEFAULT_TOKENS)
@click.option("--chat", is_flag=True, help="Use the model's chat template, with TEXT as the user's message.")
@click.option("--deadline", type=float, metavar="SECONDS", help="End the request when it takes longer.")
@click.option("--stream/--no-stream", default=None, help="Show text as it arrives (default, except with --json).")
@json_option
@deployment_options
@timeout_option
def command(
    text: str,
    chat: bool,
    deadline: float | None,
    stream: bool | None,
    as_json: bool,
    conf: Path | None,
    overrides: Overrides,
    timeout: float,
    **sampling: Any,
) -> int:
    """Complete TEXT, or standard input when TEXT is "-"."""
    if as_json and stream:
        raise click.UsageError("--json and --stream exclude each other")
    text = utf8(sys.stdin.buffer.read()) if text == "-" else text
    form = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    sampling["stop"] = list(sampling["stop"]) or None
    with connect(conf, timeout, overrides) as client, client.stream(**form, deadline_s=deadline, **sampling) as answer:
        return _show(answer, as_json, stream is not False and not as_json)


def _show(answer: Any, as_json: bool, stream: bool) -> int:
    result = play(answer, stream)
    if as_json:
        click.echo(json.dumps(result.to_json(), ensure_ascii=False))
    else:
        click.echo("" if stream else result.text)
    if result.finish_reason in ("cancelled", "deadline"):
        why = "the request was cancelled" if result.finish_reason == "cancelled" else "the deadline passed"
        click.echo(f"tetri-cli: {why}", err=True)
        return INTERRUPTED if result.finish_reason == "cancelled" else FAILED
    return OK
