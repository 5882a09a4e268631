"""What a step costs on some hardware: two measured curves and the growth with context, from a table in conf/cost."""

from __future__ import annotations

import tomllib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tetri.leg import Span

Curve = tuple[tuple[float, float], ...]  # (tokens or batch, seconds), ascending


class CostError(ValueError):
    """A cost table cannot be read; one line that says what is wrong."""


@dataclass(frozen=True, slots=True)
class Cost:
    """`prefill` by tokens in the chunk, `decode` by requests in the batch, seconds, linear in between and on
    from the last two points. `prefill_start_s`: seconds more per chunk token and per token before it;
    `decode_context_s`: seconds more per token of context in the batch."""

    prefill: Curve = ((1.0, 0.0),)
    decode: Curve = ((1.0, 0.0),)
    prefill_start_s: float = 0.0
    decode_context_s: float = 0.0

    def chunk_s(self, spans: Sequence[Span]) -> float:
        """Seconds of one prefill chunk."""
        if not spans:
            return 0.0
        tokens = sum(span.stop - span.start for span in spans)
        pairs = sum((span.stop - span.start) * span.start for span in spans)
        return _at(self.prefill, tokens) + self.prefill_start_s * pairs

    def decode_s(self, batch: int, context: int) -> float:
        """Seconds of one decode step of `batch` requests with `context` tokens together."""
        return _at(self.decode, batch) + self.decode_context_s * context if batch else 0.0


def load(path: str | Path) -> Cost:
    """Read a table: `prefill` and `decode` are lists of [x, seconds] pairs. Raises CostError."""
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        curves = {name: _curve(table.pop(name)) for name in ("prefill", "decode")}
        rates = {name: float(table.pop(name, 0.0)) for name in ("prefill_start_s", "decode_context_s")}
    except (OSError, tomllib.TOMLDecodeError, KeyError, TypeError, ValueError) as error:
        raise CostError(f"{path}: no cost table: {error!r}") from None
    if table:
        raise CostError(f"{path}: unknown key {next(iter(table))}; allowed: {', '.join((*curves, *rates))}")
    return Cost(curves["prefill"], curves["decode"], rates["prefill_start_s"], rates["decode_context_s"])


def _curve(pairs: Sequence[Sequence[float]]) -> Curve:
    curve = tuple((float(x), float(seconds)) for x, seconds in pairs)
    if not curve or list(curve) != sorted(curve) or len({x for x, _ in curve}) != len(curve):
        raise ValueError("a curve needs points with ascending x")
    return curve


def _at(curve: Curve, x: float) -> float:
    if len(curve) == 1 or x <= curve[0][0]:
        return curve[0][1]
    right = min(max(bisect_left(curve, (x, 0.0)), 1), len(curve) - 1)
    (x0, y0), (x1, y1) = curve[right - 1], curve[right]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
