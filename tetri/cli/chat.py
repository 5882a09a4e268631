"""tetri-cli chat: a conversation with the model."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import click

from tetri import terminal
from tetri.cli import FAILED, OK
from tetri.cli.answer import play
from tetri.cli.options import (
    TEXT,
    Overrides,
    connect,
    decoded,
    deployment_options,
    examples,
    sampling_options,
    stdin_text,
    timeout_option,
)

ANSWER_TOKENS = 256  # of an answer without --max-tokens; fewer if no older turn is left to make space for so many
FULL = ("context", "the largest holds")  # the protocol has no code for it: every such reason has one of these


@click.command("chat", epilog=examples("tetri-cli chat", 'tetri-cli chat --system "Answer in one sentence."'))
@sampling_options(max_tokens=ANSWER_TOKENS)
@click.option("--system", type=TEXT, help="System message before the conversation.")
@deployment_options
@timeout_option
def command(system: str | None, conf: Path | None, overrides: Overrides, timeout: float, **sampling: Any) -> int:
    """Talk to the model. Ctrl-C ends an answer, /exit or Ctrl-D the conversation."""
    sampling["stop"] = list(sampling["stop"]) or None
    history = [{"role": "system", "content": system}] if system else []
    status = OK
    with connect(conf, timeout, overrides) as client:
        while (line := _next_line()) is not None and line.strip() != "/exit":
            if line.strip():
                status = _turn(client, history, line, sampling)
    return status


def _turn(client: Any, history: list[dict[str, str]], line: str, sampling: dict[str, Any]) -> int:
    """One question and its answer. Both are added to `history`, if there was an answer."""
    from tetri.client import BadRequest, RequestFailed, RequestRefused

    history.append({"role": "user", "content": line})
    try:
        result = _answer(client, history, sampling)
    except (BadRequest, RequestFailed, RequestRefused) as error:  # the conversation continues
        history.pop()
        terminal.tell(f"tetri-cli: {error}")
        return FAILED
    terminal.show("\n")
    history.append({"role": "assistant", "content": result.text})
    return OK


def _answer(client: Any, history: list[dict[str, str]], sampling: dict[str, Any]) -> Any:
    """Get the Result. If the context is full, the oldest turns are removed from `history`; the system message stays."""
    from tetri.client import RequestRefused

    kept, first = list(history), history[0]["role"] == "system"
    asked = {**sampling, "max_tokens": ANSWER_TOKENS} if sampling["max_tokens"] is None else sampling
    while True:
        try:
            result = play(client.stream(messages=kept, **asked), show=True)
            break
        except RequestRefused as error:
            if not any(text in str(error) for text in FULL):
                raise
            if len(kept) >= first + 3:
                del kept[first : first + 2]
            elif asked is not sampling:
                asked = sampling
            else:
                raise
    if left_out := (len(history) - len(kept)) // 2:
        history[:] = kept
        turns = "turn" if left_out == 1 else f"{left_out} turns"
        terminal.tell(f"\ntetri-cli: the context is full: the oldest {turns} left out")
    return result


def _next_line() -> str | None:
    """The next question, without its newline; None at the end."""
    if not sys.stdin.isatty():
        line = sys.stdin.buffer.readline()
        return stdin_text(line) if line else None
    with contextlib.suppress(ImportError):  # enables line editing, if Python has it
        import readline  # noqa: F401
    while True:
        try:
            return decoded(input("> "), "the line")
        except EOFError:
            click.echo()
            return None
        except KeyboardInterrupt:
            click.echo("\n(/exit or Ctrl-D to leave)")
