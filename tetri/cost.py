"""What a step costs on some hardware: two measured curves and the growth with context, from a table in conf/cost."""

from __future__ import annotations

import tomllib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

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
    # What else the simulator has to know of the hardware; 0: the table does not say.
    kv_token_bytes: int = 0
    kv_tokens: int = 0  # KV capacity of one instance
    chunk_tokens: int = 0  # the knee: the smallest chunk at 95 % of the best prefill rate
    predictor_s: float = 0.0  # one run of the length predictor
    predictor_token_s: float = 0.0  # seconds more of it per prompt token
    predictor_slowdown: float = 1.0  # how much longer a step takes beside which the predictor runs
    source: str = ""

    def chunk_s(self, spans: Sequence[Span]) -> float:
        """Seconds of one prefill chunk."""
        if not spans:
            return 0.0
        tokens = sum(span.stop - span.start for span in spans)
        pairs = sum((span.stop - span.start) * span.start for span in spans)
        return _at(self.prefill, tokens) + self.prefill_start_s * pairs

    def prompt_s(self, tokens: int, done: int, chunk_tokens: int) -> float:
        """Seconds of prefill for tokens [done, tokens) of one prompt, by itself, in chunks."""
        whole, rest = divmod(tokens - done, chunk_tokens)
        pairs = sum(chunk_tokens * (done + chunk_tokens * i) for i in range(whole))
        pairs += rest * (done + chunk_tokens * whole)
        last = _at(self.prefill, rest) if rest else 0.0
        return _at(self.prefill, chunk_tokens) * whole + last + self.prefill_start_s * pairs

    def predict_s(self, tokens: int) -> float:
        """Seconds that the length predictor runs for one prompt, beside the main model."""
        return self.predictor_s + self.predictor_token_s * tokens

    def decode_run_s(self, batch: int, context: int, steps: int) -> float:
        """Seconds of so many decode steps with the same requests, `context` tokens together before the first."""
        more = batch * steps * (steps - 1) / 2
        return self.decode_s(batch, 0) * steps + self.decode_context_s * (context * steps + more) if batch else 0.0

    def decode_s(self, batch: int, context: int) -> float:
        """Seconds of one decode step of `batch` requests with `context` tokens together."""
        return _at(self.decode, batch) + self.decode_context_s * context if batch else 0.0


def load(path: str | Path) -> Cost:
    """Read a table: `prefill` and `decode` are lists of [x, seconds] pairs. Raises CostError."""
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        curves = {name: _curve(table.pop(name)) for name in ("prefill", "decode")}
        rates = {name: kind(table.pop(name, default)) for name, (kind, default) in _RATES.items()}
    except (OSError, tomllib.TOMLDecodeError, KeyError, TypeError, ValueError) as error:
        raise CostError(f"{path}: no cost table: {error!r}") from None
    if table:
        raise CostError(f"{path}: unknown key {next(iter(table))}; allowed: {', '.join((*curves, *rates))}")
    return Cost(curves["prefill"], curves["decode"], **rates)


_RATES: dict[str, tuple[Any, Any]] = {
    field.name: (type(field.default), field.default) for field in fields(Cost) if field.name not in ("prefill", "decode")
}


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
