"""tetri-cli: one module per command, imported when the command is used.

Exit status: 0 done, 1 the request or the launch failed, 2 wrong argument or configuration, 3 no broker answers, 130
interrupted.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

import click

from tetri import terminal
from tetri.cli.options import examples

OK, FAILED, USAGE, UNREACHABLE, INTERRUPTED = 0, 1, 2, 3, 130
COMMANDS = (
    *("up", "down", "status", "top", "explain", "ready", "doctor", "flip", "end", "submit", "chat", "model", "profile"),
    *("bench", "sim", "size", "predictor", "keygen", "openai-env"),
)


class LazyGroup(click.Group):
    """A group that imports a command when it is used: NAME of `lazy` is `command` in tetri.cli.{prefix}NAME."""

    def __init__(self, *args: Any, lazy: Sequence[str], prefix: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lazy, self._prefix = lazy, prefix

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, without an import."""
        return [*super().list_commands(ctx), *self._lazy]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command; None if there is none of this name."""
        if cmd_name not in self._lazy:
            return super().get_command(ctx, cmd_name)
        command = importlib.import_module(f"tetri.cli.{self._prefix}{cmd_name.replace('-', '_')}").command
        assert isinstance(command, click.Command)
        return command


_EXAMPLES = examples(
    "tetri-cli up",
    'tetri-cli submit "The capital of France is"',
    "tetri-cli top       # what happens now",
    "tetri-cli explain   # what has happened",
)
_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(cls=LazyGroup, lazy=COMMANDS, context_settings=_SETTINGS, epilog=_EXAMPLES)
@click.version_option(package_name="tetri", prog_name="tetri-cli")
def group() -> None:
    """Serve a language model with prefill and decode as far apart as the traffic asks."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Turns every expected error into one line on stderr and an exit status."""
    with terminal.program("tetri-cli"):
        sys.exit(_run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    """Run the command line and return the exit status. Raises OSError."""
    from tetri.client import BadRequest, TetriError, Unreachable
    from tetri.models import ModelError
    from tetri.private import PrivateError
    from tetri.proc.supervise import LaunchError
    from tetri.strict import ConfigError

    try:
        return group.main(arguments, prog_name="tetri-cli", standalone_mode=False) or OK
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return USAGE
    except click.UsageError as error:
        return _failed(_usage(error), USAGE)
    except click.ClickException as error:
        return _failed(error.format_message(), USAGE)
    except (ConfigError, ModelError, BadRequest) as error:
        return _failed(str(error), USAGE)
    except Unreachable as error:
        return _failed(str(error), UNREACHABLE)
    except (TetriError, LaunchError, PrivateError) as error:
        return _failed(str(error), FAILED)
    except (KeyboardInterrupt, click.Abort):
        return _failed("interrupted", INTERRUPTED)


def _usage(error: click.UsageError) -> str:
    """What is wrong with the arguments, on one line: click puts each choice on its own."""
    message = " ".join(error.format_message().split()).rstrip(".")
    if error.ctx is None:
        return f"{message} (see tetri-cli --help)"
    where = error.ctx.command_path
    values = [each.make_metavar(error.ctx) for each in error.ctx.command.params if isinstance(each, click.Argument)]
    if values and isinstance(error, click.NoSuchOption):
        message = f"{message}; if it is a value, put it last, after --: {where} [OPTIONS] -- {' '.join(values)}"
    return f"{message} (see {where} --help)"


def _failed(message: str, status: int) -> int:
    terminal.tell(f"tetri-cli: {message}")
    return status
