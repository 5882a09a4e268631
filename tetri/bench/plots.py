"""Plot a run: the latencies of the requests and a timeline of each instance. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tetri import atomic

Span = tuple[float, float, str]  # start, stop (seconds), kind: prefill, decode or mixed

COLOURS = {"prefill": "#2a6fbb", "decode": "#d9822b", "mixed": "#7a4fa3"}
ROW_INCHES, MOST_INCHES = 0.22, 24.0
SPANS = 20_000  # of all instances; above this number, spans that are too close to be seen apart are joined
PIXELS = 1500  # width of a timeline


def save(figure: Any, path: Path) -> None:
    """Write a figure as a PNG, atomically. Raises OSError."""
    with atomic.file(path) as part:
        figure.savefig(part, format="png", dpi=140, metadata={"Software": None})


def draw(path: Path, times: Mapping[str, Sequence[float]], spans: Mapping[str, Sequence[Span]]) -> None:
    """Write a PNG with the distribution of each metric in `times` (seconds) and a timeline of the instances."""
    from matplotlib.figure import Figure

    rows = min(max(len(spans) * ROW_INCHES, 1.5), MOST_INCHES)
    figure: Any = Figure(figsize=(11, 4 + rows), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(4, rows))
    for axes, (name, values) in zip(above.subplots(1, len(times), squeeze=False)[0], times.items(), strict=True):
        _cdf(axes, name, values)
    _timeline(below.subplots(), spans)
    save(figure, path)


def _cdf(axes: Any, name: str, values: Sequence[float]) -> None:
    ordered = sorted(values)
    shares = [(i + 1) / len(ordered) for i in range(len(ordered))]
    axes.step(ordered, shares, where="post", color="#2a6fbb")
    axes.set(xlabel=f"{name} (s)", ylabel="share of requests", ylim=(0, 1.02), title=f"{name}, {len(ordered)} requests")
    axes.grid(alpha=0.3)


def _timeline(axes: Any, spans: Mapping[str, Sequence[Span]]) -> None:
    """Draw one row for each instance, the first on top."""
    from matplotlib.patches import Patch

    ends = [span[1] for row in spans.values() for span in row]
    many = sum(map(len, spans.values())) > SPANS
    gap = max(ends, default=0.0) / PIXELS if many else 0.0
    for place, row in enumerate(spans.values()):
        for what, colour in COLOURS.items():
            bars = joined([(start, stop) for start, stop, kind in row if kind == what], gap)
            axes.broken_barh(
                [(start, stop - start) for start, stop in bars], (place - 0.4, 0.8), facecolors=colour, linewidth=0
            )
    axes.set(xlabel="time (s)", yticks=range(len(spans)), yticklabels=list(spans), ylim=(len(spans) - 0.4, -0.6))
    axes.tick_params("y", labelsize=7 if len(spans) > 24 else 9)
    patches = [Patch(color=colour, label=what) for what, colour in COLOURS.items()]
    axes.legend(handles=patches, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, fontsize=8, frameon=False)


def joined(bars: Sequence[tuple[float, float]], gap: float) -> list[tuple[float, float]]:
    """Join neighbouring bars that are at most `gap` seconds apart."""
    made: list[tuple[float, float]] = []
    for start, stop in bars:
        if made and start - made[-1][1] <= gap:
            made[-1] = (made[-1][0], stop)
        else:
            made.append((start, stop))
    return made
