"""Pictures of a run: how long requests took, and what each instance did when. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tetri import atomic

Span = tuple[float, float, str]  # start, stop, what: prefill, decode or mixed

COLOURS = {"prefill": "#2a6fbb", "decode": "#d9822b", "mixed": "#7a4fa3"}
ROW_INCHES, MOST_INCHES = 0.22, 24.0
SPANS = 20_000  # of all instances together; beyond that, what is too short to be seen is joined
PIXELS = 1500  # that a timeline is wide


class PlotError(RuntimeError):
    """Nothing can be drawn; one line that says what to do."""


def ready(path: Path | None = None) -> None:
    """To be asked before all the work. Raises PlotError when matplotlib is not installed, or when `path` is no PNG in a
    folder that exists."""
    if path is not None and path.suffix.lower() != ".png":
        raise PlotError(f"--plot draws a PNG: call it FILE.png, not {str(path)!r}")
    if path is not None and not path.absolute().parent.is_dir():
        raise PlotError(f"--plot: there is no folder {path.absolute().parent}")
    try:
        import matplotlib
    except ImportError:
        raise PlotError("drawing needs matplotlib: pip install 'tetri[plot]'") from None
    matplotlib.use("Agg")


def save(figure: Any, path: Path) -> None:
    """As a PNG: all of the file or nothing."""
    with atomic.file(path) as part:
        figure.savefig(part, format="png", dpi=140, metadata={"Software": None})


def draw(path: Path, times: Mapping[str, Sequence[float]], spans: Mapping[str, Sequence[Span]]) -> None:
    """Values by name, in seconds, as cumulative shares; below them the spans of each instance. A PNG."""
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
    """One row an instance, the first on top."""
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
    """Peers that lie at most `gap` apart as one."""
    made: list[tuple[float, float]] = []
    for start, stop in bars:
        if made and start - made[-1][1] <= gap:
            made[-1] = (made[-1][0], stop)
        else:
            made.append((start, stop))
    return made
