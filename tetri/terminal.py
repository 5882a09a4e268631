"""What programs print: no locale, closed stream, full disk or text of a model breaks it.

A terminal gets its own encoding, with escapes for what it cannot show. A pipe or a file gets UTF-8 in every locale.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import click

# A terminal may obey control characters, and overrides of the direction of text hide what is written.
_HARMFUL = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}
_HARMFUL |= {code: f"\\u{code:04x}" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}


@contextmanager
def program(name: str) -> Iterator[None]:
    """Run a program with prepared standard streams, and end it with SystemExit. An OSError, such as that of a full
    disk, is one line on stderr and status 1; so is what stdout did not take. A reader that is gone is status 1 alone.
    """
    prepare()
    status: Any = 0
    try:
        yield
    except SystemExit as ended:
        status = ended.code
    except OSError as error:
        status = 1
        if not _lost(name):
            where = f"{error.filename}: " if error.filename else ""
            tell(f"{name}: {where}{error.strerror or error}")
    if _lost(name):
        status = status or 1
    sys.exit(status)


def prepare() -> None:
    """Open a closed standard stream as /dev/null, and set encodings with which no text fails."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # gets the lowest free descriptor: that of the closed stream
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)
    _set(sys.stdin, "surrogateescape")  # see tetri.cli.options.decoded
    for out, exact in ((sys.stdout, "surrogateescape"), (sys.stderr, "backslashreplace")):
        if out.isatty():
            _set(out, "backslashreplace")
        else:
            _set(out, exact, "utf-8")


def _set(stream: TextIO, errors: str, encoding: str | None = None) -> None:
    if isinstance(stream, io.TextIOWrapper):  # not a stand-in
        stream.reconfigure(encoding=encoding, errors=errors)


def show(text: str) -> None:
    """Print text of a model at once: its bytes to a pipe or a file, without control characters to a terminal. Raises
    OSError."""
    sys.stdout.write(_harmless(text, sys.stdout))
    sys.stdout.flush()


def print_json(value: Any, out: TextIO | None = None) -> None:
    """Print a value as one line of JSON in ASCII, to `out` or stdout. Raises OSError."""
    click.echo(json.dumps(value), file=out)


def tell(line: str) -> None:
    """Print a line on stderr, harmless to a terminal. One that fails stops nothing: the exit status remains."""
    try:
        click.echo(_harmless(line, sys.stderr), err=True)
    except OSError:
        _drop(sys.stderr)


def harmless(text: str) -> str:
    """A text of somebody else, with escapes for what a terminal would obey."""
    return text.translate(_HARMFUL)


def _harmless(text: str, stream: TextIO) -> str:
    return harmless(text) if stream.isatty() else text


def _lost(name: str) -> bool:
    """Whether stdout does not take what is printed. Says why, unless the reader is gone."""
    try:
        sys.stdout.flush()
    except OSError as error:
        _drop(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            tell(f"{name}: standard output: {error.strerror}")
        return True
    return False


def _drop(stream: TextIO) -> None:
    """Send what `stream` still holds to /dev/null: Python writes it at exit, and would fail again."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
