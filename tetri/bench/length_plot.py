"""Plot predicted against real output lengths. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tetri.bench.plots import save

Ranges = Sequence[tuple[float, float, float]]  # for each text: the 10th, 50th and 90th percentile of the prediction


def draw(path: Path, by_kind: Mapping[str, Ranges], tokens: Sequence[int]) -> None:
    """Write a PNG with the predictions of each kind of predictor over the real lengths, in tokens."""
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(5.5 * len(by_kind), 5.5), layout="constrained")
    for axes, (kind, ranges) in zip(figure.subplots(1, len(by_kind), squeeze=False)[0], by_kind.items(), strict=True):
        _scatter(axes, kind, ranges, tokens)
    save(figure, path)


def _scatter(axes: Any, kind: str, ranges: Ranges, tokens: Sequence[int]) -> None:
    low, middle, high = zip(*ranges, strict=True) if ranges else ((), (), ())
    top = max([*tokens, *high], default=1) * 1.03
    axes.vlines(tokens, low, high, colors="#2a6fbb", alpha=0.12, linewidth=1.5)
    axes.scatter(tokens, middle, s=9, color="#2a6fbb")
    axes.plot([0, top], [0, top], color="#555555", linewidth=0.8, linestyle="--")
    axes.set(
        xlabel="output tokens",
        ylabel="predicted: median, 10 to 90 %",
        xlim=(0, top),
        ylim=(0, top),
        title=f"{kind}, {len(tokens)} texts",
    )
    axes.grid(alpha=0.3)
