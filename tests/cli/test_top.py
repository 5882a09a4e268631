"""tetri-cli top, on a terminal and without one."""

import contextlib
import json
import os
import pty
import signal
import subprocess
import termios

import pytest
from observed import member, observation

from tests.cli.fakes import environment, start
from tests.cli.fakes import on_terminal as run_on_terminal

FOUND = observation(member("p0", "prefill"), member("d0", "decode"))


def observed(message):
    return [FOUND]


@contextlib.contextmanager
def on_terminal(*arguments, stdin=None):
    """The command on a terminal of its own, or with another stdin: the process, a function that reads what the terminal
    got until a text is there, and what writes to the terminal."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    before = termios.tcgetattr(theirs)
    stdin = theirs if stdin is None else stdin
    process = start("top", *arguments, stdin=stdin, stdout=theirs, stderr=theirs, env=environment(TERM="xterm"))
    got = b""

    def until(text):
        nonlocal got
        while text not in got:
            got += os.read(ours, 65536)
        got = got.split(text, 1)[1]

    try:
        yield process, until, lambda keys: os.write(ours, keys)
        until(b"\x1b[?1049l")  # the screen of before
        assert termios.tcgetattr(theirs) == before
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize(
    ("leave", "status"), [(b"xq", 0), (signal.SIGINT, 0), (signal.SIGTERM, 143)], ids=["q", "Ctrl-C", "SIGTERM"]
)
def test_it_leaves_the_terminal_as_it_was(broker, leave, status):
    broker(observed)
    with on_terminal() as (process, until, press):
        until(b"p0")
        press(leave) if isinstance(leave, bytes) else process.send_signal(leave)
        assert process.wait(30) == status


def test_it_leaves_the_terminal_as_it_was_also_without_a_keyboard(broker):
    broker(observed)
    with on_terminal(stdin=subprocess.DEVNULL) as (process, until, _):
        until(b"p0")
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143


def test_on_a_dumb_terminal_it_prints_one_screen(broker):
    """The cursor cannot move there."""
    broker(observed)
    status, got = run_on_terminal("top", TERM="dumb")
    assert status == 0 and b"p0       prefill" in got and b"\x1b" not in got


def test_it_goes_on_when_the_broker_is_away(broker):
    there = True
    fake = broker(lambda message: [FOUND] if there else [])
    with on_terminal("--interval", "0.05") as (process, until, press):
        until(b"requests")
        there = False
        until(b"does not answer")
        there = True
        fake.seen.clear()
        for _ in range(2):
            until(b"\x1b[Hmodel")
        assert {(message["epoch"], message["since"]) for message in fake.seen} == {(1, 1)}
        press(b"q")
        assert process.wait(30) == 0


def test_once_prints_one_screen_and_so_does_a_pipe(run, broker):
    fake = broker(observed)
    for arguments in (["--once"], []):
        status, out, err = run("top", *arguments)
        assert (status, err) == (0, "") and "p0       prefill" in out and "\x1b" not in out
    assert fake.types() == ["observe", "observe"]


def test_json_is_an_observation(run, broker):
    broker(observed)
    assert json.loads(run("top", "--json")[1]) == {key: value for key, value in FOUND.items() if key != "type"}


def test_without_a_deployment_it_says_so(run, place):
    assert run("top", "--once")[0] == 3 and "tetri-cli up" in run("top")[2]


def test_the_help_explains_the_columns(run):
    assert "heavy       waiting and running requests" in run("top", "--help")[1]
