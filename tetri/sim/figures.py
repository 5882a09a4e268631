"""What the paper plots, from conf/paper/figures.toml, and a simulated point beside it."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[2] / "conf" / "paper" / "figures.toml"


@dataclass(frozen=True, slots=True)
class Point:
    """One point of a figure: what was simulated and what the paper shows, None where it shows nothing."""

    figure: str
    point: str
    value: float
    paper: float | None


@cache
def plotted() -> dict[str, Any]:
    """The paper's values by figure."""
    return tomllib.loads(FILE.read_text(encoding="utf-8"))
