"""tetri-cli predictor: makes and evaluates a length predictor (docs/predictor.md)."""

from __future__ import annotations

import click

from tetri.cli import LazyGroup


@click.group("predictor", cls=LazyGroup, lazy=("collect", "train", "eval"), prefix="predictor_")
def command() -> None:
    """Collect the output lengths of a model, train a length predictor on them, and evaluate it."""
