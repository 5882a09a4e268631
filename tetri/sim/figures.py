"""The values that the paper plots, read from conf/paper/figures.toml."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[2] / "conf" / "paper" / "figures.toml"


@dataclass(frozen=True, slots=True)
class Point:
    """One point of a figure: the simulated `value` and the paper's, None where the paper shows none."""

    figure: str
    point: str
    value: float
    paper: float | None


@cache
def plotted() -> dict[str, Any]:
    """Return the paper's values by figure."""
    return tomllib.loads(FILE.read_text(encoding="utf-8"))
