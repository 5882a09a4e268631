"""tetri-cli submit: sends one request and shows its output."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from tetri import terminal
from tetri.cli import FAILED, INTERRUPTED, OK
from tetri.cli.answer import play
from tetri.cli.options import (
    TEXT,
    Overrides,
    connect,
    deployment_options,
    json_option,
    sampling_options,
    stdin_text,
    timeout_option,
)
from tetri.request import DEFAULT_TOKENS


@click.command("submit")
@click.argument("text", type=TEXT)
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
    """Complete TEXT, or standard input when TEXT is "-". Put a TEXT that begins with a dash last, after --.

    A pipe or a file gets the text in UTF-8 in every locale, and --json in ASCII. A terminal gets escapes such as \\x1b
    for control characters and for what it cannot show.
    """
    if as_json and stream:
        raise click.UsageError("--json and --stream exclude each other")
    text = stdin_text(sys.stdin.buffer.read()) if text == "-" else text
    form = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    sampling["stop"] = list(sampling["stop"]) or None
    with connect(conf, timeout, overrides) as client, client.stream(**form, deadline_s=deadline, **sampling) as answer:
        return _show(answer, as_json, stream is not False and not as_json)


def _show(answer: Any, as_json: bool, stream: bool) -> int:
    result = play(answer, stream)
    if as_json:
        terminal.print_json(result.to_json())
    else:
        terminal.show("\n" if stream else f"{result.text}\n")
    if result.finish_reason in ("cancelled", "deadline"):
        why = "the request was cancelled" if result.finish_reason == "cancelled" else "the deadline passed"
        terminal.tell(f"tetri-cli: {why}")
        return INTERRUPTED if result.finish_reason == "cancelled" else FAILED
    return OK
