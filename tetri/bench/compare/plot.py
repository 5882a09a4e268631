"""Plot a comparison. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tetri.bench.compare.evidence import ATTAINED, JCT, TTFT, Metric
from tetri.bench.plots import save

COLOURS = ("#2a6fbb", "#d9822b", "#7a4fa3", "#2e8b57", "#b03060", "#8c6d31", "#555555", "#20a5a5")
BY_RATE = (ATTAINED, TTFT, JCT)
Times = Mapping[str, Sequence[float]]  # values of all requests by arrangement, seconds


def draw(path: Path, cells: Sequence[tuple[str, Mapping[str, Times]]], found: Mapping[str, Any]) -> None:
    """Write a PNG: for each of `cells`, a title and the times by metric, a row with the distributions of TTFT, TPOT and
    JCT; before them, where several rates were measured, a row of values by rate for each workload and regime."""
    from matplotlib.figure import Figure

    curves = _curves(found) if found["goodput"] else {}
    rows = len(curves) + len(cells)
    figure: Any = Figure(figsize=(15, 3.6 * rows), layout="constrained")
    axes = figure.subplots(rows, 3, squeeze=False)
    for line, (title, by_name) in zip(axes, curves.items(), strict=False):
        for one, metric in zip(line, BY_RATE, strict=True):
            _by_rate(one, metric, title, by_name)
    for line, (title, metrics) in zip(axes[len(curves) :], cells, strict=True):
        for one, (name, times) in zip(line, metrics.items(), strict=True):
            _cdf(one, f"{title}: {name}", times)
    axes[0][0].legend(loc="best", fontsize=8, frameon=False)
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


def _curves(found: Mapping[str, Any]) -> dict[str, dict[str, list[tuple[float, dict[str, float]]]]]:
    """The measured values at each rate, by workload and regime, and by arrangement."""
    made: dict[str, dict[str, list[tuple[float, dict[str, float]]]]] = {}
    for cell in found["cells"]:
        panel = made.setdefault(f"{cell['workload']}, {cell['regime']}", {})
        for name, row in cell["arrangements"].items():
            points = panel.setdefault(name, [])
            if "measured" in row:
                points.append((cell["rate_s"], row["measured"]))
    return made


def _by_rate(axes: Any, metric: Metric, title: str, by_name: Mapping[str, Sequence[tuple[float, Any]]]) -> None:
    for name, points in by_name.items():
        if points:
            line = sorted((rate, measured[metric.name]) for rate, measured in points)
            axes.plot(*zip(*line, strict=True), marker="o", label=name, color=colour([*by_name], name))
    axes.set(xlabel="requests/s", ylabel="seconds", title=f"{title}: {metric.name}")
    axes.set_ylim(bottom=0)
    if metric is ATTAINED:
        axes.axhline(0.9, color="black", linewidth=0.6, linestyle=":")
        axes.set(ylabel="share that kept its limits", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
