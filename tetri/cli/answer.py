"""An answer on the terminal, while it appears."""

from __future__ import annotations

import sys
from typing import Any

import click


def play(answer: Any, show: bool) -> Any:
    """Run a Stream to its end and give its Result; Ctrl-C cancels the request. `show`: print text."""
    try:
        _print(answer, show)
    except KeyboardInterrupt:
        click.echo("cancelling; once more to leave at once", err=True)
        answer.cancel()
        _print(answer, show)  # what came in the meantime is part of the answer
    return answer.result


def _print(answer: Any, show: bool) -> None:
    for piece in answer:
        if show:
            click.echo(piece, nl=False)
            sys.stdout.flush()
