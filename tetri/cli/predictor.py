"""tetri-cli predictor: how long answers will be, learnt from the model itself (docs/predictor.md)."""

from __future__ import annotations

import importlib

import click

COMMANDS = ("collect", "train", "eval")  # each with a module of its own, predictor_NAME


class PredictorGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"tetri.cli.predictor_{cmd_name}").command
        assert isinstance(command, click.Command)
        return command


@click.group("predictor", cls=PredictorGroup)
def command() -> None:
    """Collect what a model answers, train a predictor of its output lengths on that, and evaluate it."""
