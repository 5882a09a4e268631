"""The output of bench_prediction: tables in Markdown and a plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tetri.bench.plots import save
from tetri.bench.report import markdown

KINDS = ("none", "prior", "classifier", "hidden", "both", "noisy", "oracle")
SHOWN = ("jct_mean", "jct_p50", "jct_p95", "jct_p99", "ttft_p99", "tpot_p95")
SEEN = 0.0005  # smaller relative differences may be rounding errors

Row = dict[str, Any]


def verdict(row: Row, metric: str, against: str = "against_none") -> str:
    """Return "pays" or "costs" if the interval excludes zero clearly, else ""."""
    found = row[against].get(metric)
    if found is None:
        return ""
    return "pays" if found["share"]["high"] < -SEEN else "costs" if found["share"]["low"] > SEEN else ""


def tables(point: dict[str, Any], metrics: Sequence[str] = SHOWN) -> str:
    """Return the results in Markdown, one table for each metric."""
    speed = f"{point['rate']:.3g} requests per second" if point["load"] else "all at once"
    head = (
        f"### {point['name']}\n\n{point['requests']} requests, {speed}; {point['prefill']} prefill and"
        f" {point['decode']} decode instances with {point['kv_tokens']} tokens of KV; {point['seeds']} seeds."
    )
    together = [_table(point, metric, "against_plain") for metric in ("jct_mean", "jct_p99")]
    return "\n\n".join([head, *(_table(point, metric) for metric in metrics), *together, _beside(point)])


def _table(point: dict[str, Any], metric: str, against: str = "against_none") -> str:
    plain = f", all against {point['policies'][0]} and none" if against == "against_plain" else ""
    return _by_policy(point, f"{metric}{plain}", lambda row: _cell(row, metric, against))


def _by_policy(point: dict[str, Any], corner: str, cell: Callable[[Row], str]) -> str:
    """Format a table with a line for each policy and a column for each predictor."""
    lines = [[policy, *(cell(row) for row in point["rows"] if row["policy"] == policy)] for policy in point["policies"]]
    return markdown([corner, *point["kinds"]], lines)


def _cell(row: Row, metric: str, against: str) -> str:
    if not row[against]:
        return f"{row[metric]:.4g} s"
    share = row[against][metric]["share"]
    bold = "**" if verdict(row, metric, against) else ""
    shown = [f"{100 * share[name]:+.1f}" for name in ("mean", "low", "high")]
    return f"{bold}{shown[0]}{bold} [{shown[1]}, {shown[2]}]"


def _beside(point: dict[str, Any]) -> str:
    def cell(row: Row) -> str:
        scored = row.get("scored")
        more = f"; {row['right'] / scored:.0%}, {row['prior_right'] / scored:.0%}" if scored else ""
        off = f"; {1 - row['on']:.0%} off" if scored and row["on"] < 1 else ""
        return f"{row['preempted']:.1%}{more}{off}"

    return _by_policy(point, "preempted; right, prior right", cell)


def draw(path: Path, points: Sequence[dict[str, Any]]) -> None:
    """Plot the difference of each predictor to none: mean JCT above, p99 below, one column for each setting."""
    from matplotlib.figure import Figure

    metrics = ("jct_mean", "jct_p99")
    figure: Any = Figure(figsize=(5 * len(points), 9), layout="constrained")
    grid = figure.subplots(len(metrics), len(points), squeeze=False)
    for column, point in enumerate(points):
        for axes, metric in zip(grid[:, column], metrics, strict=True):
            for place, kind in enumerate(point["kinds"][1:]):
                found = [row["against_none"][metric]["share"] for row in point["rows"] if row["length"] == kind]
                at = [index + 0.12 * (place - 2.5) for index in range(len(found))]
                means = [100 * each["mean"] for each in found]
                halves = [100 * (each["high"] - each["mean"]) for each in found]
                axes.errorbar(at, means, halves, fmt="o", markersize=4, capsize=2, label=kind)
            axes.axhline(0.0, color="black", linewidth=0.8)
            axes.set_xticks(range(len(point["policies"])), point["policies"], rotation=25, ha="right")
            axes.set(title=point["name"], ylabel=f"{metric} against none, %")
            axes.grid(axis="y", alpha=0.3)
    grid[0, 0].legend(fontsize="small")
    save(figure, path)
