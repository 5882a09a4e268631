"""The command line as a whole: wrong arguments, help, and what it imports."""

import os
import shlex
import subprocess
import sys

import click
import pytest

from tests.cli.fakes import environment
from tetri import cli


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["submit"], "Missing argument"),
        (["flip", "d0"], "Missing argument 'ROLE'. Choose from: prefill, decode, mixed"),
        (["submit", "x", "--max-tokens", "0"], "max_tokens must be at least 1"),
        (["submit", "x", "--max-tokens", "many"], "not a valid integer"),
        (["submit", "x", "--json", "--stream"], "exclude each other"),
        (["submit", "x", "--conf", "nowhere.toml"], "nowhere.toml: cannot be read"),
        (["submit", "x", "--max-tokens", "9" * 400], "max_tokens must be from 1"),
        (["nonsense"], "No such command"),
        (["predictor", "predict"], "No such command 'predict'"),
        (["up", "--conf", "nowhere.toml"], "nowhere.toml: cannot be read"),
        (["up", "--set", "engine.kin=3"], "engine.kin: unknown key"),
        (["up", "--set", "model.name=/nowhere"], "unknown model '/nowhere'"),
        (["model", "fetch", "nothing"], "unknown model 'nothing'"),
    ],
)
def test_wrong_arguments_are_one_line(run, broker, arguments, says):
    broker()
    status, out, err = run(*arguments)
    assert status == 2 and out == "" and says in err and err.count("\n") == 1 and err.startswith("tetri-cli: ")


def test_help_lists_every_command_and_imports_nothing_slow():
    heavy = {
        *("zmq", "msgpack", "rich", "jinja2", "tokenizers", "torch", "numpy", "transformers", "matplotlib"),
        *("tetri.client", "tetri.config", "tetri.models"),
    }
    code = f"""
import sys, tetri.cli as c
groups = [c.group.get_command(None, name) for name in c.COMMANDS]
groups = [each for each in groups if isinstance(each, c.LazyGroup)]
found = [each.get_command(None, name) for each in groups for name in each.list_commands(None)]
print(sorted({heavy} & sys.modules.keys()), "tetri.cli.predictor_eval" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] True"


def test_no_arguments_and_help(run):
    status, out, _ = run()
    assert status == 2 and all(name in out for name in cli.COMMANDS)
    assert run("--help")[0] == 0
    assert run("--version")[1].startswith("tetri-cli")


def commands(group, path=("tetri-cli",)):
    """Every command below a group, with the names that call it."""
    for name in group.list_commands(None):
        command = group.get_command(None, name)
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


def parsed(arguments):
    """The names of the command that would run with these arguments. Raises UsageError."""
    command, context, path = cli.group, None, ()
    while isinstance(command, click.Group):
        context = command.make_context(arguments[0], list(arguments[1:]), parent=context)
        path = (*path, arguments[0])
        _, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        arguments = [command.name, *rest]
    command.make_context(arguments[0], arguments[1:], parent=context)
    return (*path, command.name)


def test_the_help_of_every_command_has_examples_that_parse(place, tmp_path, monkeypatch):
    (tmp_path / "conf").mkdir()
    for name in ("emulated.toml", "split.toml"):
        (tmp_path / "conf" / name).touch()
    monkeypatch.chdir(tmp_path)  # some options try whether they can write
    for path, command in [((), cli.group), *commands(cli.group)]:
        head, *lines = [line.strip() for line in (command.epilog or "").removeprefix("\b\n").splitlines()]
        assert head == "Examples:" and lines, path
        for line in lines:
            line = os.path.expandvars(line.removeprefix('eval "$(').removesuffix(')"')).split(" < ")[0]
            found = parsed(shlex.split(line, comments=True))
            assert found == (path or found)


@pytest.mark.parametrize(
    ("arguments", "closed", "expected"),
    [
        ("submit -", "<&-", (0, b"one two three\n", b"")),
        ("submit hi", ">&-", (0, b"", b"")),
        ("submit hi", "2>&-", (0, b"one two three\n", b"")),
        ("nonsense", "2>&-", (2, b"", b"")),
        ("chat", "<&- >&- 2>&-", (0, b"", b"")),
        ("submit hi", ">/dev/full", (1, b"", b"tetri-cli: standard output: No space left on device\n")),
        ("--help", ">/dev/full", (1, b"", b"tetri-cli: standard output: No space left on device\n")),
        ("nonsense", "2>/dev/full", (2, b"", b"")),
    ],
)
def test_a_closed_or_full_stream_is_never_a_traceback(broker, arguments, closed, expected):
    broker()
    code = f"exec '{sys.executable}' -c 'from tetri.cli import main; main()' {arguments} {closed}"
    done = subprocess.run(["sh", "-c", code], capture_output=True, env=environment(), timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == expected


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["submit", "-1 + 1 ="], "; if it is a value, put it last, after --: tetri-cli submit [OPTIONS] -- TEXT (see"),
        (["submit", "--seed", "1", "--why?"], "tetri-cli submit [OPTIONS] -- TEXT"),
        (["flip", "-d0", "decode"], "tetri-cli flip [OPTIONS] -- IID ROLE"),
        (["end", "-r"], "tetri-cli end [OPTIONS] -- RID"),
    ],
)
def test_a_value_with_a_dash_is_told_how_to_be_given(run, arguments, says):
    status, out, err = run(*arguments)
    assert (status, out, err.count("\n")) == (2, "", 1) and says in err


def test_an_unknown_option_of_a_command_without_values_is_just_unknown(run):
    assert "--" not in run("status", "-x")[2].replace("--help", "")


def test_two_dashes_let_a_prompt_begin_with_one(run, broker):
    fake = broker()
    assert run("submit", "--", "-1 + 1 =")[0] == 0 and fake.seen[0]["prompt"] == "-1 + 1 ="
