"""tetri-cli submit: sends one request and shows its output."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from tetri import terminal
from tetri.cli import FAILED, INTERRUPTED, OK
from tetri.cli.answer import play
from tetri.cli.options import (
    COUNT,
    TEXT,
    Overrides,
    connect,
    deployment_options,
    examples,
    json_option,
    sampling_options,
    stdin_text,
    timeout_option,
)
from tetri.request import DEFAULT_TOKENS, Slo

ENDS = {"cancelled": ("the request was cancelled", INTERRUPTED), "deadline": ("the deadline passed", FAILED)}
_EXAMPLES = examples(
    'tetri-cli submit "The capital of France is"',
    'tetri-cli submit "Once upon a time" -n 4 --temperature 1 --json',
    'tetri-cli submit "Once upon a time" --ttft 0.5 --tpot 0.05',
    "tetri-cli submit --chat - < question.txt",
)


@click.command("submit", epilog=_EXAMPLES)
@click.argument("text", type=TEXT)
@sampling_options(max_tokens=DEFAULT_TOKENS)
@click.option("--chat", is_flag=True, help="Use the model's chat template, with TEXT as the user's message.")
@click.option("--deadline", type=float, metavar="SECONDS", help="End the request when it takes longer.")
@click.option("--ttft", type=float, metavar="SECONDS", help="Limit to the first token (default: the deployment's).")
@click.option("--tpot", type=float, metavar="SECONDS", help="Limit of the mean time between two tokens after that.")
@click.option("-n", "n", type=COUNT, default=1, help="Number of answers; above 1 with a --temperature above 0.")
@click.option("--logprobs", type=int, metavar="K", help="Show each token's log probability and the K likeliest tokens.")
@click.option(
    "--stream/--no-stream", default=None, help="Show text as it arrives (default, except with --json and with -n)."
)
@json_option
@deployment_options
@timeout_option
def command(
    text: str,
    chat: bool,
    deadline: float | None,
    ttft: float | None,
    tpot: float | None,
    n: int,
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
    if n > 1 and stream:
        raise click.UsageError("--stream shows one answer: leave out -n, or --stream")
    text = stdin_text(sys.stdin.buffer.read()) if text == "-" else text
    form = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    sampling["stop"] = list(sampling["stop"]) or None
    asked = {**form, "deadline_s": deadline, "slo": Slo(ttft_s=ttft, tpot_s=tpot), **sampling}
    stream = stream is not False and not as_json and n == 1
    with (
        connect(conf, timeout, overrides) as client,
        client.stream(**asked) if stream else client.events(**asked, n=n) as answer,
    ):
        return _show(answer, as_json, stream)


def _show(answer: Any, as_json: bool, stream: bool) -> int:
    result = play(answer, stream)
    if as_json:
        terminal.print_json(result.to_json())
    else:
        terminal.show("".join(_lines(result, stream)))
    reasons = [each.finish_reason for each in result.choices]
    for reason, (why, status) in ENDS.items():
        if reason in reasons:
            terminal.tell(f"tetri-cli: {why}")
            return status
    return OK


def _lines(result: Any, shown: bool) -> Iterator[str]:
    """The choices, each below a heading if there are several; `shown`: the text of the only one is shown already."""
    for choice in result.choices:
        if result.others:
            tokens = choice.usage.completion_tokens
            yield f"choice {choice.choice}: {choice.finish_reason}, {tokens} token{'' if tokens == 1 else 's'}\n"
        yield "\n" if shown else f"{choice.text}\n"
        for token in choice.logprobs or ():
            top = ", ".join(f"{likely} {logprob:.4f}" for likely, logprob in token.top.items())
            yield f"token {token.id}: {token.logprob:.4f}{f' (likeliest: {top})' if top else ''}\n"
