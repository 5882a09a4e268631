"""Plot a comparison. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tetri.bench.compare.evidence import ATTAINED
from tetri.bench.plots import save

COLOURS = ("#2a6fbb", "#d9822b", "#7a4fa3", "#2e8b57", "#b03060", "#8c6d31", "#555555", "#20a5a5")
Times = Mapping[str, Sequence[float]]  # values of all requests by arrangement, seconds


def draw(path: Path, cells: Sequence[tuple[str, Mapping[str, Times]]], found: Mapping[str, Any]) -> None:
    """Write a PNG: for each cell a row with the distributions of TTFT, TPOT and JCT; where several rates were measured,
    the attainment by rate. `cells`: a title, and the times by metric."""
    from matplotlib.figure import Figure

    curves = _curves(found) if found["goodput"] else []
    rows = len(cells) + bool(curves)
    figure: Any = Figure(figsize=(15, 3.6 * rows), layout="constrained")
    axes = figure.subplots(rows, 3, squeeze=False)
    for line, (title, metrics) in zip(axes, cells, strict=False):
        for one, (metric, times) in zip(line, metrics.items(), strict=True):
            _cdf(one, f"{title}: {metric}", times)
    for one, (title, by_name) in zip(axes[-1], curves, strict=False):
        _attainment(one, title, by_name)
    axes[0][0].legend(loc="lower right", fontsize=8, frameon=False)
    save(figure, path)


def colour(names: Sequence[str], name: str) -> str:
    """The same colour for an arrangement in every panel."""
    return COLOURS[[*names].index(name) % len(COLOURS)]


def _cdf(axes: Any, title: str, times: Times) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    for name, values in times.items():
        ordered = sorted(values)
        shares = [(place + 1) / len(ordered) for place in range(len(ordered))]
        axes.step(ordered, shares, where="post", label=name, color=colour([*times], name), linewidth=1.2)
    axes.set(xlabel="seconds", ylabel="share of requests", ylim=(0, 1.02), title=title, xscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)


def _curves(found: Mapping[str, Any]) -> list[tuple[str, dict[str, list[tuple[float, float]]]]]:
    made: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for cell in found["cells"]:
        panel = made.setdefault(f"{cell['workload']}, {cell['regime']}", {})
        for name, row in cell["arrangements"].items():
            points = panel.setdefault(name, [])
            if "measured" in row:
                points.append((cell["rate_s"], row["measured"][ATTAINED.name]))
    return [*made.items()]


def _attainment(axes: Any, title: str, by_name: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    for name, points in by_name.items():
        if points:
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name, color=colour([*by_name], name))
    axes.axhline(0.9, color="black", linewidth=0.6, linestyle=":")
    axes.set(xlabel="requests/s", ylabel="share that kept its limits", ylim=(0, 1.02), title=title)
    axes.grid(alpha=0.3)
