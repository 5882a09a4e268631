"""Plot a sweep: the goodput of the best coupled arrangement, the best split and auto in each case. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tetri.bench.plots import save

KINDS = {"coupled": "#7a4fa3", "split": "#d9822b", "auto": "#2a6fbb"}  # how the names of arrangements begin -> colour
ROW_INCHES = 0.2


def draw(path: Path, cases: Sequence[Mapping[str, Any]]) -> None:
    """Write a PNG with one panel for each regime. `cases`: as `tetri-cli sim sweep --json` prints them."""
    from matplotlib.figure import Figure

    panels: dict[str, list[Mapping[str, Any]]] = {}
    for case in cases:
        panels.setdefault(case["case"].rsplit("/", 1)[1], []).append(case)
    rows = max(map(len, panels.values()))
    figure: Any = Figure(figsize=(5 * len(panels) + 2, 2 + rows * ROW_INCHES), layout="constrained")
    for axes, (regime, panel) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for kind, colour in KINDS.items():
            found = [(_best(case, kind), row) for row, case in enumerate(panel)]
            shown = [(share, row) for share, row in found if share]
            axes.scatter(*zip(*shown, strict=True) if shown else ([], []), color=colour, label=kind, s=14)
        names = [case["case"].rsplit("/", 1)[0] for case in panel]
        axes.set(xlabel="goodput / fluid bound", title=regime, yticks=range(len(panel)), yticklabels=names)
        axes.set_ylim(len(panel) - 0.5, -0.5)
        axes.tick_params("y", labelsize=7)
        axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    save(figure, path)


def _best(case: Mapping[str, Any], kind: str) -> float:
    """The best goodput of this kind, of the bound; 0 if it is not the best of the case."""
    goodputs = [each["goodput"] or 0.0 for each in case["arrangements"] if each["arrangement"].startswith(kind)]
    return float(max(goodputs, default=0.0)) / float(case["bound"])
