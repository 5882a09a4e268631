"""What arrives at a terminal, a pipe or a full disk, in any locale."""

import errno
import io
import json
import os
import sys
from pathlib import Path

import pytest

from tetri import terminal

EMOJI = "é 😀 👩‍🚀"  # the last one has a zero-width joiner
ESCAPES = "\x1b[31mred\x1b[0m\a\b\r\x7f\x9b2J"


class Terminal(io.TextIOWrapper):
    def isatty(self):
        return True


class Full(io.RawIOBase):
    def __init__(self, error=errno.ENOSPC):
        self.error = error

    def writable(self):
        return True

    def write(self, data):
        raise OSError(self.error, os.strerror(self.error))


def stream(kind, encoding, monkeypatch, name="stdout"):
    """Put a stream of this encoding in place of a standard one."""
    made = kind(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, name, made)
    return made


@pytest.mark.parametrize(
    ("kind", "encoding", "text", "arrives"),
    [
        (io.TextIOWrapper, "utf-8", EMOJI + ESCAPES, (EMOJI + ESCAPES).encode()),
        (io.TextIOWrapper, "latin-1", EMOJI + ESCAPES, (EMOJI + ESCAPES).encode()),
        (io.TextIOWrapper, "ascii", "a\tb\r\nc\n", b"a\tb\r\nc\n"),
        (io.TextIOWrapper, "ascii", "/tmp/\udcff", b"/tmp/\xff"),  # a path of other bytes
        (Terminal, "utf-8", EMOJI, EMOJI.encode()),
        (Terminal, "utf-8", "a\tb\nc", b"a\tb\nc"),
        (Terminal, "utf-8", ESCAPES, rb"\x1b[31mred\x1b[0m\x07\x08\x0d\x7f\x9b2J"),
        (Terminal, "utf-8", "\u202eabc\u2066\u200f", rb"\u202eabc\u2066" + "\u200f".encode()),
        (Terminal, "latin-1", "é 😀 €", b"\xe9 \\U0001f600 \\u20ac"),
        (Terminal, "ascii", "é 😀", rb"\xe9 \U0001f600"),
    ],
)
def test_text_of_a_model(kind, encoding, text, arrives, monkeypatch):
    out = stream(kind, encoding, monkeypatch)
    terminal.prepare()
    for char in text:  # as in pieces: an escape sequence may be cut
        terminal.show(char)
    assert out.buffer.getvalue() == arrives


@pytest.mark.parametrize("kind", [io.TextIOWrapper, Terminal])
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_json_is_one_line_of_ascii_and_the_same_value(kind, encoding, monkeypatch):
    out = stream(kind, encoding, monkeypatch)
    terminal.prepare()
    terminal.print_json({"text": EMOJI + ESCAPES})
    found = out.buffer.getvalue().decode("ascii")
    assert json.loads(found) == {"text": EMOJI + ESCAPES}
    assert found.endswith("\n") and found[:-1].isprintable()


def test_a_line_on_stderr_is_harmless_and_never_fails(monkeypatch):
    err = stream(Terminal, "latin-1", monkeypatch, "stderr")
    terminal.prepare()
    terminal.tell("the model said \x1b[2J😀")
    assert err.buffer.getvalue() == b"the model said \\x1b[2J\\U0001f600\n"


def test_a_closed_stream_is_the_null_device(monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    terminal.prepare()
    opened = (sys.stdin, sys.stdout, sys.stderr)
    try:
        terminal.show("😀")
        terminal.tell("😀")
        assert sys.stdin.read() == "" and all(os.get_inheritable(each.fileno()) for each in opened)
    finally:
        for each in opened:
            each.close()


@pytest.mark.parametrize(
    ("raised", "status", "says"),
    [
        (None, 0, ""),
        (SystemExit(3), 3, ""),
        (SystemExit(None), None, ""),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 1, "prog: /x: Permission denied\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "prog: No space left on device\n"),
    ],
)
def test_the_exit_status_of_a_program(raised, status, says, capsys):
    with pytest.raises(SystemExit) as ended, terminal.program("prog"):
        print("results")
        if raised is not None:
            raise raised
    assert (ended.value.code, *capsys.readouterr()) == (status, "results\n", says)


@pytest.mark.parametrize("ends", [0, 4])
@pytest.mark.parametrize(
    ("error", "says"), [(errno.ENOSPC, "prog: standard output: No space left on device\n"), (errno.EPIPE, "")]
)
def test_what_stdout_does_not_take_is_said_unless_nobody_reads_it(error, says, ends, capsys, monkeypatch, tmp_path):
    class Output(io.TextIOWrapper):
        def fileno(self):
            return self.spare

    with open(tmp_path / "spare", "w") as spare:
        out = Output(io.BufferedWriter(Full(error)), encoding="utf-8")
        out.spare = spare.fileno()
        monkeypatch.setattr(sys, "stdout", out)
        with pytest.raises(SystemExit) as ended, terminal.program("prog"):
            out.write("results\n")
            sys.exit(ends)
        assert (ended.value.code, capsys.readouterr().err) == (ends or 1, says)
        out.buffer.raw.write = len  # as the null device, for the end of the test
        out.flush()


def test_no_program_writes_to_stderr_past_tell():
    package = Path(terminal.__file__).parent
    files = [path.name for path in package.rglob("*.py") if ", err=True" in path.read_text(encoding="utf-8")]
    assert files == ["terminal.py"]
