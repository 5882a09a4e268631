"""Shows the text of a request on the terminal as it arrives."""

from __future__ import annotations

import signal
from typing import Any

from tetri import terminal


def play(answer: Any, show: bool) -> Any:
    """Run a Stream to its end and return its Result. Ctrl-C cancels the request. `show`: print text as it arrives."""

    def interrupt(number: int, frame: Any) -> None:
        # No exception here: it could lose a piece that is received but not printed.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        terminal.tell("cancelling; press Ctrl-C again to leave at once")
        answer.cancel_soon()

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        for piece in answer:
            if show:
                terminal.show(piece)
    finally:
        signal.signal(signal.SIGINT, before)
    return answer.result
