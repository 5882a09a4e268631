"""Plot the hand-over of one long prompt: the prefill worker's forward passes and copies, the decode worker's copies.
Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tetri.bench.handover.stages import Interval, Move
from tetri.bench.plots import save

#: name and colour of each row, from the top
ROWS = {
    "forward pass": "#2a6fbb",
    "copy into the slab": "#7fb0e0",
    "copy from the slab into the engine": "#d9822b",
    "first decode step": "#8c5a1e",
}
NEAR_S = 0.012  # margin of the enlarged panels


def draw(path: Path, move: Move) -> None:
    """Write a PNG with three panels: the whole hand-over, one chunk, and the end."""
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(11, 8), layout="constrained")
    whole, middle, end = figure.subplots(3, 1)
    start, last = move.passes[0].begun, move.chunks[-1]
    _panel(whole, move, start, move.first_step.ended)
    whole.set_title(f"One prompt of {move.tokens:,} tokens, prefilled in {len(move.passes)} passes; chunk by chunk")
    chunk = move.chunks[(len(move.chunks) - 1) // 2]
    _panel(middle, move, chunk.computed.ended - NEAR_S / 4, chunk.copied.ended + NEAR_S / 2)
    middle.set_title(f"Chunk {chunk.index}: its copies, and the pass of chunk {chunk.index + 1}")
    _panel(end, move, last.computed.ended - NEAR_S / 4, move.first_step.begun + NEAR_S / 2)
    end.set_title(f"The end: the first decode step begins {1000 * move.seconds:.1f} ms after the last pass ended")
    end.set_xlabel("ms since the first pass began")
    save(figure, path)


def _panel(axes: Any, move: Move, start: float, stop: float) -> None:
    zero = move.passes[0].begun
    for place, (name, bars) in enumerate(rows(move).items()):
        for number, bar in enumerate(bars):
            if bar.ended < start or bar.begun > stop:
                continue
            spot = (1000 * (bar.begun - zero), 1000 * (bar.ended - bar.begun))
            edge = "white" if place == 0 else ROWS[name]  # a white edge would hide thin bars
            axes.broken_barh([spot], (place - 0.4, 0.8), facecolors=ROWS[name], edgecolor=edge, linewidth=0.8)
            middle = 1000 * ((max(bar.begun, start) + min(bar.ended, stop)) / 2 - zero)
            if bar.ended - bar.begun > 0.03 * (stop - start) and len(bars) > 1:
                axes.text(middle, place, str(number), ha="center", va="center", color="white", fontsize=8)
    axes.set(
        xlim=(1000 * (start - zero), 1000 * (stop - zero)),
        ylim=(len(ROWS) - 0.4, -0.6),
        yticks=range(len(ROWS)),
        yticklabels=list(ROWS),
    )
    axes.grid(axis="x", alpha=0.3)


def rows(move: Move) -> dict[str, list[Interval]]:
    """Return the bars of each row, in the order of the chunks."""
    chunks = move.chunks
    bars = (
        list(move.passes),
        [chunk.exported for chunk in chunks],
        [chunk.copied for chunk in chunks],
        [move.first_step],
    )
    return dict(zip(ROWS, bars, strict=True))
