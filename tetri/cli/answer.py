"""An answer on the terminal, while it appears."""

from __future__ import annotations

import signal
import sys
from typing import Any

import click


def play(answer: Any, show: bool) -> Any:
    """Run a Stream to its end and give its Result; Ctrl-C cancels the request. `show`: print text as it comes."""

    def interrupt(number: int, frame: Any) -> None:
        # Not an exception: that could come between taking a piece and printing it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        click.echo("cancelling; once more to leave at once", err=True)
        answer.cancel_soon()

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        for piece in answer:
            if show:
                click.echo(piece, nl=False)
                sys.stdout.flush()
    finally:
        signal.signal(signal.SIGINT, before)
    return answer.result
