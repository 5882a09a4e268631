"""The cost model: predicts the seconds of an engine step from measured curves. Tables for hardware are in conf/cost."""

from __future__ import annotations

import json
import math
import tomllib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from tetri.engine_request import Span
from tetri.strict import shown

Curve = tuple[tuple[float, float], ...]  # (tokens or batch size, seconds): the first ascend, the second never fall
STILL = 0.02  # a factor that differs from the one in use by no more than this share does not replace it
MOST_CORRECTED = 100.0  # the largest factor of a correction; the smallest is its inverse
TABLES = Path(__file__).parent.parent / "conf" / "cost"  # folder of the tables that are known by name


class CostError(ValueError):
    """A cost table cannot be read; one line that states what is wrong."""


class StepCost(Protocol):
    """What predicts the seconds of a step: a table, or a corrected one."""

    def step_s(self, spans: Sequence[Span], batch: int, context: int) -> float:
        """As Cost.step_s."""


class _At(dict[float, float]):
    """The seconds of a curve by x. A core asks for the same few x again and again, so each is computed once."""

    def __init__(self, curve: Curve) -> None:
        super().__init__()
        self.curve = curve

    def __missing__(self, x: float) -> float:
        self[x] = seconds = _at(self.curve, x)
        return seconds


@dataclass(frozen=True)
class Cost:
    """A cost table. `prefill` gives seconds by tokens in the chunk, `decode` by requests in the batch. Curves are
    linear between points and beyond the last two; below the first point they are constant. `prefill_start_s`: seconds
    added per chunk token and token before it in its prompt; `decode_context_s`: seconds added per token of context in
    the batch.

    Since a curve never falls, no step is cheaper than a smaller one, and extrapolation yields no negative time. Raises
    CostError for an invalid value."""

    prefill: Curve = ((1.0, 0.0),)
    decode: Curve = ((1.0, 0.0),)
    prefill_start_s: float = 0.0
    decode_context_s: float = 0.0
    # Further properties of the hardware, for the simulator; 0: unknown.
    kv_token_bytes: int = 0
    kv_tokens: int = 0  # KV capacity of one instance
    chunk_tokens: int = 0  # the smallest chunk that reaches 95 % of the best prefill rate
    predictor_s: float = 0.0  # seconds of one run of the length predictor
    predictor_token_s: float = 0.0  # seconds added per prompt token
    predictor_slowdown: float = 1.0  # factor on the time of a step while the predictor runs in parallel
    source: str = ""

    def __post_init__(self) -> None:
        for problem in _problems(self):
            raise CostError(problem)

    @cached_property
    def _prefill_at(self) -> _At:
        return _At(self.prefill)

    @cached_property
    def _decode_at(self) -> _At:
        return _At(self.decode)

    def chunk_s(self, spans: Sequence[Span]) -> float:
        """Seconds of one prefill chunk."""
        if not spans:
            return 0.0
        tokens = pairs = 0
        for span in spans:
            count = span.stop - span.start
            tokens += count
            pairs += count * span.start
        return self._prefill_at[tokens] + self.prefill_start_s * pairs

    def prompt_s(self, tokens: int, done: int, chunk_tokens: int) -> float:
        """Seconds of prefill for tokens [done, tokens) of one prompt, by itself, in chunks. The computation takes
        constant time, since the broker calls it for every request."""
        whole, rest = divmod(max(tokens - done, 0), chunk_tokens)
        # Chunk i starts at done + i x chunk_tokens, so the sum is an arithmetic series.
        pairs = chunk_tokens * (done * whole + chunk_tokens * (whole * (whole - 1) // 2))
        pairs += rest * (done + chunk_tokens * whole)
        last = self._prefill_at[rest] if rest else 0.0
        return self._prefill_at[chunk_tokens] * whole + last + self.prefill_start_s * pairs

    def shared_s(self, tokens: int, chunk_tokens: int) -> float:
        """Seconds of prefill for a prompt in chunks that other prompts fill up: its part of these."""
        whole, rest = divmod(tokens, chunk_tokens)
        first_s = self.prompt_s(whole * chunk_tokens, 0, chunk_tokens)
        return first_s + self._prefill_at[chunk_tokens] * rest / chunk_tokens if rest else first_s

    def predict_s(self, tokens: int) -> float:
        """Seconds that the length predictor runs for one prompt of `tokens` tokens."""
        return self.predictor_s + self.predictor_token_s * tokens

    def decode_run_s(self, batch: int, context: int, steps: int) -> float:
        """Seconds of `steps` decode steps with the same `batch` requests, which have `context` tokens in total before
        the first step."""
        more = batch * steps * (steps - 1) / 2
        return self.decode_s(batch, 0) * steps + self.decode_context_s * (context * steps + more) if batch else 0.0

    def decode_s(self, batch: int, context: int) -> float:
        """Seconds of one decode step of `batch` requests with `context` tokens in total."""
        return self._decode_at[batch] + self.decode_context_s * context if batch else 0.0

    def step_s(self, spans: Sequence[Span], batch: int, context: int) -> float:
        """Seconds of one step that prefills `spans` and decodes `batch` requests. The fixed cost of a step counts
        once: it is the decode step of one request without context, or the chunk if that is less."""
        return self.mixed_s(self.chunk_s(spans), batch, context)

    def mixed_s(self, chunk: float, batch: int, context: int) -> float:
        """As `step_s`, for spans that take `chunk` seconds by themselves."""
        decode = self.decode_s(batch, context)
        return chunk + decode - min(chunk, self.decode_s(1, 0)) if chunk and decode else chunk + decode


class CorrectedCost:
    """A cost table, corrected while the engine serves: the predictions of Cost, times a factor for each phase. A step
    of both phases costs what its chunk does, and what its decodes add to that. `table`: the table as it was measured.
    """

    def __init__(self, table: Cost) -> None:
        self.table = table
        self.prefill = self.decode = 1.0

    def correct(self, prefill: float | None, decode: float | None) -> None:
        """Set the factors: measured over predicted time of the steps of a phase, None if it is not known. A factor
        stays as it is while the new one hardly differs, so that predictions hold still."""
        self.prefill = _corrected(self.prefill, prefill)
        self.decode = _corrected(self.decode, decode)

    def chunk_s(self, spans: Sequence[Span]) -> float:
        """As Cost.chunk_s."""
        return self.table.chunk_s(spans) * self.prefill

    def prompt_s(self, tokens: int, done: int, chunk_tokens: int) -> float:
        """As Cost.prompt_s."""
        return self.table.prompt_s(tokens, done, chunk_tokens) * self.prefill

    def decode_run_s(self, batch: int, context: int, steps: int) -> float:
        """As Cost.decode_run_s."""
        return self.table.decode_run_s(batch, context, steps) * self.decode

    def decode_s(self, batch: int, context: int) -> float:
        """As Cost.decode_s."""
        return self.table.decode_s(batch, context) * self.decode

    def step_s(self, spans: Sequence[Span], batch: int, context: int) -> float:
        """As Cost.step_s."""
        chunk = self.table.chunk_s(spans)
        return chunk * self.prefill + (self.table.mixed_s(chunk, batch, context) - chunk) * self.decode


def _corrected(old: float, found: float | None) -> float:
    if found is None or abs(found - old) <= STILL * old:
        return old
    return min(max(found, 1 / MOST_CORRECTED), MOST_CORRECTED)


def load(table: str | Path) -> Cost:
    """Read a table; its `prefill` and `decode` are lists of [x, seconds] pairs. `table` is a file, or the name of one
    in conf/cost if it is a string without a slash and without the suffix .toml. Raises CostError."""
    path = _path(table)
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CostError(f"{path}: no cost table: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # bytes that are no text, no TOML, or nested without end
        raise CostError(f"{path}: not a TOML file: {error}") from None
    for key in found:
        if key not in _FIELDS:
            raise CostError(f"{path}: unknown key {key}; allowed: {', '.join(_FIELDS)}")
    for key in CURVES:
        if key not in found:
            raise CostError(f"{path}: {key} is missing: a list of [x, seconds] pairs")
        found[key] = _pairs(found[key])
    try:
        return Cost(**found)
    except CostError as error:
        raise CostError(f"{path}: {error}") from None


def dump(cost: Cost, comments: Sequence[str] = ()) -> str:
    """The TOML text of a table, with comment lines at its head. `load` reads an equal Cost from it."""
    lines = [f"# {line}".rstrip() for comment in comments for line in comment.splitlines() or [""]]
    for field in fields(Cost):
        value = getattr(cost, field.name)
        if field.name in CURVES:
            lines += [f"{field.name} = [", *(f"    [{_number(x)}, {_number(s)}]," for x, s in value), "]"]
        elif value != field.default:
            # A JSON string is a valid TOML string, except for DEL.
            text = json.dumps(value, ensure_ascii=False) if isinstance(value, str) else _number(value)
            lines.append(f"{field.name} = {text}".replace("\x7f", "\\u007f"))
    return "\n".join([*lines, ""])


CURVES = ("prefill", "decode")
_FIELDS = {field.name: field.default for field in fields(Cost)}


def _path(table: str | Path) -> Path:
    if isinstance(table, Path) or "/" in table or table.endswith(".toml"):
        return Path(table)
    path = TABLES / f"{table}.toml"
    if not path.is_file():
        known = ", ".join(sorted(other.stem for other in TABLES.glob("*.toml")))
        raise CostError(f"no cost table is called {table!r}; known: {known} (or give a file: PATH.toml)")
    return path


def _pairs(value: Any) -> Any:
    """Lists as tuples; a value that is no list of pairs stays as it is, and Cost refuses it."""
    if not isinstance(value, list):
        return value
    return tuple(tuple(pair) if isinstance(pair, list) else pair for pair in value)


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)


def _problems(cost: Cost) -> Iterator[str]:
    for name in CURVES:
        problem = _curve_problem(getattr(cost, name))
        if problem:
            yield f"{name}: {problem}"
    for name, default in _FIELDS.items():
        value = getattr(cost, name)
        if isinstance(default, str) and not isinstance(value, str):
            yield f"{name} must be a text, got {_shown(value)}"
        elif isinstance(default, int) and (type(value) is not int or not 0 <= value < 1 << 63):
            yield f"{name} must be a whole number, 0 or more, got {_shown(value)}"
        elif isinstance(default, float) and not _is_number(value):
            yield f"{name} must be a number, 0 or more, got {_shown(value)}"
    if not cost.predictor_slowdown >= 1:
        yield f"predictor_slowdown must be at least 1, got {_shown(cost.predictor_slowdown)}"


def _curve_problem(curve: Any) -> str | None:
    if not isinstance(curve, tuple) or not curve:
        return f"must be a list of [x, seconds] pairs, got {_shown(curve)}"
    for pair in curve:
        if not isinstance(pair, tuple) or len(pair) != 2 or not all(map(_is_number, pair)):
            return f"must have two numbers, 0 or more, in each pair, got {_shown(pair)}"
    for (x0, y0), (x1, y1) in zip(curve, curve[1:], strict=False):
        if x1 <= x0:
            return f"its x must ascend, but {x1:g} comes after {x0:g}"
        if y1 < y0:
            return f"its seconds must not fall, but {y1:g} s at {x1:g} comes after {y0:g} s at {x0:g}"
    return None


def _is_number(value: Any) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63
    return whole or (isinstance(value, float) and 0 <= value < math.inf)  # never true for NaN


def _shown(value: Any) -> str:
    return shown(value, repr, 100)


def _at(curve: Curve, x: float) -> float:
    if len(curve) == 1 or x <= curve[0][0]:
        return curve[0][1]
    right = min(max(bisect_left(curve, (x, 0.0)), 1), len(curve) - 1)
    (x0, y0), (x1, y1) = curve[right - 1], curve[right]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
