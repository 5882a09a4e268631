"""tetri-cli top: a live picture of the deployment."""

from __future__ import annotations

import contextlib
import inspect
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import msgspec

from tetri import terminal
from tetri.cli.columns import meanings
from tetri.cli.options import Overrides, connect, deployment_options, examples, json_option, seconds_option
from tetri.cli.screen import DECODE, PREFILL, Screen
from tetri.wire.clients import Observation

INTERVAL_S = 0.5
_SILENT_S = 2.0  # without an answer for so long, the screen says so


@click.command(
    "top",
    epilog=examples("tetri-cli top", "tetri-cli top --once   # for scripts", "tetri-cli top --json"),
)
@seconds_option("--interval", default=INTERVAL_S, help="Time between two looks.")
@click.option("--once", is_flag=True, help="Print one screen, with latencies since the broker's start.")
@json_option
@deployment_options
def command(interval: float, once: bool, as_json: bool, conf: Path | None, overrides: Overrides) -> None:
    """Show live how instances and requests fare, until q or Ctrl-C. Without a terminal, or on a dumb one: once.

    --json prints an Observation (docs/protocol.md). An instance is in the bank of each phase that it has work of."""
    if as_json or once or not _on_terminal():
        with connect(conf, _SILENT_S, overrides) as client:
            found = client.observe()
        if as_json:
            terminal.print_json(found)
        else:
            _print_once(msgspec.convert(found, Observation))
        return
    with contextlib.suppress(KeyboardInterrupt), _Looks(conf, overrides) as looks:
        _follow(looks, interval)


command.help = f"{inspect.cleandoc(command.help or '')}\n\n{meanings((*PREFILL, *DECODE))}"


def _on_terminal() -> bool:
    """Whether stdout is a terminal on which the cursor moves."""
    return sys.stdout.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


class _Looks:
    """Asks the broker again and again: after a failure over a new connection, since its address may be another."""

    def __init__(self, conf: Path | None, overrides: Overrides) -> None:
        self._connect: Callable[[], Any] = lambda: connect(conf, _SILENT_S, overrides)
        self._client: Any = self._connect()

    def next(self, screen: Screen) -> None:
        """Tell the screen of the newest Observation, or why there is none."""
        from tetri.client import TetriError

        try:
            self._client = self._client or self._connect()
            found = self._client.observe(*screen.seen)
        except TetriError as error:
            screen.away = str(error)
            self.close()
        else:
            screen.observed(time.monotonic(), msgspec.convert(found, Observation))

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def __enter__(self) -> _Looks:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _follow(looks: _Looks, interval: float) -> None:
    from rich.console import Console
    from rich.live import Live

    console, screen = Console(highlight=False), Screen()
    with _terminable(), _keys() as pressed, Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            looks.next(screen)
            width, height = console.size
            live.update(screen.render(time.monotonic(), width, height, console.options.ascii_only), refresh=True)
            if pressed(interval) == "q":
                return


def _print_once(observation: Observation) -> None:
    from rich.console import Console

    console, screen, now = Console(highlight=False), Screen(whole=True), time.monotonic()
    screen.observed(now, observation)
    console.print(screen.render(now, *console.size, console.options.ascii_only))


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends what is inside as an exception does, so that the terminal is as before afterwards."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """A function that waits for a key, at most so many seconds: "" if none was pressed. The terminal shows no keys
    meanwhile, and is as before afterwards."""
    if not sys.stdin.isatty():
        yield _sleep
        return
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)

    def pressed(wait_s: float) -> str:
        ready, _, _ = select.select([keyboard], [], [], wait_s)
        return os.read(keyboard, 1).decode("latin-1") if ready else ""

    try:
        tty.setcbreak(keyboard, termios.TCSADRAIN)  # keeps what is typed already
        yield pressed
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


def _sleep(wait_s: float) -> str:
    time.sleep(wait_s)
    return ""
