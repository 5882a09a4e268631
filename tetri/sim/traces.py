"""Requests for the simulator: read from a trace file or drawn at random."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import chain, count, islice
from operator import itemgetter
from pathlib import Path
from random import Random
from statistics import NormalDist
from typing import Any, NamedTuple, TextIO

from tetri.request import Sampling
from tetri.sim.texts import RecordedText

_CLOCK = 19  # characters of "2023-11-16 18:15:46"
LONGEST = 10_000_000  # the most tokens of a prompt or an output
MOST = 100_000_000  # the most requests of one run
LAST_S = 1e9  # the latest arrival: 30 years
LONGEST_HEAD = 1 << 20  # characters of the first line


class TraceError(ValueError):
    """The requests cannot be read or drawn; one line that says what is wrong."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request. `at_s`: arrival time; `prompt` and `output`: tokens; `deadline_s`: seconds from the arrival to the
    deadline. Without a `text` it asks for exactly `output` tokens. With one it asks for at most `text.limit` tokens and
    ends after the text's `output` tokens, which only the engine and an oracle know. `sampling`: only used with faults,
    where tokens are computed; `output` is then its `max_tokens`. `n`: choices, each of so many tokens."""

    at_s: float
    prompt: int
    output: int
    deadline_s: float | None = None
    text: RecordedText | None = None
    sampling: Sampling | None = None
    n: int = 1


# ---------------------------------------------------------------- traces


class Format(NamedTuple):
    """A format of traces: CSV with a header, or a JSON object per line. `columns`: arrival time, prompt tokens, output
    tokens, and what distinguishes it from a format that has the same three. `unit`: of the time, see `UNITS`."""

    name: str
    columns: tuple[str, ...]
    unit: str


class Trace(NamedTuple):
    """The requests of a trace in order of arrival, the first at time 0. `notes`: a line for each way in which they
    differ from the file."""

    arrivals: Iterator[Arrival]
    requests: int
    notes: list[str]


def _date_s(text: str) -> float:
    """Parse a time such as "2023-11-16 18:15:46.6805900", with any number of digits and optionally "+00:00" (as in
    Azure's traces of 2024). Raises ValueError."""
    fraction = text[_CLOCK:].removesuffix("+00:00")
    if fraction and not (fraction[0] == "." and fraction[1:].isdigit()):
        raise ValueError(text)
    whole = datetime.fromisoformat(text[:_CLOCK]) - datetime(2000, 1, 1)
    return whole.total_seconds() + float(f"0{fraction}" if fraction else 0)


UNITS: dict[str, Callable[[Any], float]] = {"s": float, "ms": lambda value: float(value) / 1000, "date": _date_s}
FORMATS = (
    Format("Azure 2023, 2024", ("TIMESTAMP", "ContextTokens", "GeneratedTokens"), "date"),
    Format("BurstGPT", ("Timestamp", "Request tokens", "Response tokens"), "s"),
    Format("vidur", ("arrived_at", "num_prefill_tokens", "num_decode_tokens"), "s"),
    Format("splitwise-sim", ("arrival_timestamp", "prompt_size", "token_size"), "s"),
    Format("Qwen Bailian", ("timestamp", "input_length", "output_length", "chat_id"), "s"),
    Format("Mooncake", ("timestamp", "input_length", "output_length"), "ms"),
)
Row = tuple[float, int, int]  # seconds since any moment, prompt tokens, output tokens


def replayed(path: str | Path, speedup: float = 1.0, requests: int = 0) -> Trace:
    """Read a trace in one of `FORMATS`. The times between requests are divided by `speedup`. `requests` 0: each row
    once; else this many requests, and no more rows are read; a shorter trace is repeated as often as necessary, and two
    rounds are separated by the mean time between requests. A row without prompt or output tokens is skipped. The rows
    that are read are sorted by time. The file may be a pipe. Raises TraceError with the number of the wrong line."""
    if not (math.isfinite(speedup) and speedup > 0):
        raise TraceError(f"the speedup must be above 0, got {speedup:g}")
    if requests:
        _check_number(requests)
    rows, notes = _read(Path(path), speedup, requests)
    endless = _repeated(rows, speedup)
    return Trace(islice(endless, requests or len(rows)), requests or len(rows), notes)


def _check_number(requests: int) -> None:
    if not 1 <= requests <= MOST:
        raise TraceError(f"the number of requests must be at least 1 and at most {MOST}, got {requests}")


def _repeated(rows: Sequence[Row], speedup: float) -> Iterator[Arrival]:
    first, last = rows[0][0], (rows[-1][0] - rows[0][0]) / speedup
    round_s = last + (last / (len(rows) - 1) if len(rows) > 1 else 1.0)
    for number in count():
        for when, prompt, output in rows:
            yield Arrival(number * round_s + (when - first) / speedup, prompt, output)


def _read(path: Path, speedup: float, most: int) -> tuple[list[Row], list[str]]:
    """The first `most` rows (0: all) in order of time, and notes. Raises TraceError."""
    rows: list[Row] = []
    skipped = late = 0
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            for number, row in _parsed(file, path):
                if not (row[1] and row[2]):
                    skipped += 1
                    continue
                if rows:
                    late += row[0] < rows[-1][0]
                    if (lasts := abs(row[0] - rows[0][0]) / speedup) > LAST_S:
                        raise TraceError(f"{path}:{number}: {lasts:g} s from the first: use a larger speedup")
                rows.append(row)
                if len(rows) == most:
                    break
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise TraceError(f"{path}: not a text file ({error}); unpack it if it is compressed") from None
    notes = [f"rows skipped for 0 prompt or output tokens: {skipped}"] if skipped else []
    if not rows:
        raise TraceError("; ".join([f"{path}: the trace has no requests", *notes]))
    if late:
        notes.append(f"rows earlier than the one before: {late}; the {len(rows)} requests are sorted by time")
        rows.sort(key=itemgetter(0))
    return rows, notes


def _parsed(file: TextIO, path: Path) -> Iterator[tuple[int, Row]]:
    """Yield (line number, row). Raises TraceError, OSError, UnicodeDecodeError and csv.Error."""
    head = file.readline(LONGEST_HEAD)
    lines: Iterator[tuple[int, Any]]
    pick: Callable[[Any], Sequence[Any]]
    if head.startswith("{"):
        form = _format([*_json(head)], head, path)
        pick = itemgetter(*form.columns[:3])
        lines = ((number, _json(line)) for number, line in enumerate(chain([head], file), 1) if line.strip())
    else:
        names = [name.strip() for name in next(csv.reader([head]), [])]
        form = _format(names, head, path)
        pick = itemgetter(*map(names.index, form.columns[:3]))
        reader = csv.reader(file)
        lines = ((reader.line_num + 1, row) for row in reader if row)  # editors leave an empty line at the end
    seconds = UNITS[form.unit]
    for number, line in lines:
        try:
            when, prompt, output = pick(line)
            row = seconds(when), _tokens(prompt), _tokens(output)
            if not math.isfinite(row[0]):
                raise ValueError
        except (ValueError, TypeError, LookupError, OverflowError):
            shown = ",".join(map(str, line)) if isinstance(line, list) else str(line)
            wanted = f"{','.join(form.columns[:3])}: a time and two numbers of tokens from 0 to {LONGEST}"
            raise TraceError(f"{path}:{number}: must have {wanted}, got {_short(shown)!r}") from None
        yield number, row


def _format(names: Sequence[str], head: str, path: Path) -> Format:
    for form in FORMATS:
        if {*form.columns} <= {*names}:
            return form
    known = "; ".join(f"{','.join(form.columns)} ({form.name})" for form in FORMATS)
    raise TraceError(f"{path}:1: unknown columns {_short(head.strip())!r}: a trace has {known}")


def _json(line: str) -> Any:
    """The value in a line; the line itself if it is not JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return line


def _tokens(value: Any) -> int:
    """Raises ValueError or TypeError."""
    tokens = float(value)  # pandas writes 12.0 into a column with gaps
    if not (0 <= tokens <= LONGEST and tokens.is_integer()):
        raise ValueError(value)
    return int(tokens)


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]}..."


# ---------------------------------------------------------------- drawn requests


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """A distribution of lengths in tokens. `kind`: fixed (`a`), uniform (from `a` to `b`) or lognormal (median `a`,
    standard deviation `b` of the logarithm, clipped to 1 and `LONGEST`)."""

    kind: str
    a: float
    b: float = 0.0

    @classmethod
    def parsed(cls, text: str) -> TokenCounts:
        """Parse "512", "128-1024" or "lognormal:MEDIAN:SIGMA". Raises TraceError."""
        try:
            made = cls._read(text)
        except ValueError:
            made = None
        if made is None or not (1 <= made.a <= LONGEST and 0 <= made.b <= LONGEST):
            raise TraceError(
                f"lengths must be N, LOW-HIGH or lognormal:MEDIAN:SIGMA, from 1 to {LONGEST}, got {text!r}"
            )
        return made

    @classmethod
    def _read(cls, text: str) -> TokenCounts | None:
        if text.startswith("lognormal:"):
            _, median, sigma = text.split(":")
            return cls("lognormal", float(median), float(sigma))
        low, dash, high = text.partition("-")
        made = cls("uniform", int(low), int(high)) if dash else cls("fixed", int(low))
        return made if not dash or made.a <= made.b else None

    def draw(self, rng: Random) -> int:
        """Draw a number of tokens."""
        if self.kind == "uniform":
            return rng.randint(int(self.a), int(self.b))
        if self.kind == "lognormal":
            logarithm = rng.normalvariate(math.log(self.a), self.b)
            return max(1, round(math.exp(min(logarithm, math.log(LONGEST)))))
        return int(self.a)

    def spread(self, count: int) -> list[int]:
        """So many lengths that have exactly this distribution: each is the middle of an equal share of it."""
        shares = [(number + 0.5) / count for number in range(count)]
        if self.kind == "uniform":
            return [int(self.a + share * (self.b + 1 - self.a)) for share in shares]
        if self.kind == "lognormal" and self.b:
            normal = NormalDist(math.log(self.a), self.b)
            return [max(1, round(math.exp(min(normal.inv_cdf(share), math.log(LONGEST))))) for share in shares]
        return [round(self.a)] * count


def drawn(
    requests: int, prompt: TokenCounts, output: TokenCounts, seed: int, rate: float = 0.0, burstiness: float = 1.0
) -> Iterator[Arrival]:
    """Draw requests with these distributions of lengths. `rate` 0: all arrive at time 0 (a closed batch); else `rate`
    requests per second, with gamma-distributed times between them whose coefficient of variation is `burstiness` (1: a
    Poisson process). Raises TraceError."""
    _check_drawing(requests, rate, burstiness)
    rng = Random(f"requests {seed}")
    return (Arrival(now, prompt.draw(rng), output.draw(rng)) for now in _times(requests, rng, rate, burstiness))


def resampled(
    requests: int, texts: Sequence[RecordedText], seed: int, rate: float = 0.0, burstiness: float = 1.0
) -> Iterator[Arrival]:
    """Draw requests uniformly from recorded texts, with replacement; they arrive as in `drawn`. Raises TraceError."""
    _check_drawing(requests, rate, burstiness)
    rng = Random(f"texts {seed}")
    for now in _times(requests, rng, rate, burstiness):
        text = rng.choice(texts)
        yield Arrival(now, text.prompt, text.output, text=text)


def _check_drawing(requests: int, rate: float, burstiness: float) -> None:
    _check_number(requests)
    if not (math.isfinite(rate) and rate >= 0):
        raise TraceError(f"the rate must be at least 0 requests per second, got {rate:g}")
    if 0 < rate * LAST_S < requests:
        raise TraceError(f"at a rate of {rate:g} per second {requests} requests take more than {LAST_S:g} s")
    if not 0.01 <= burstiness <= 100:
        raise TraceError(f"the burstiness must be from 0.01 to 100, got {burstiness:g}")


def _times(requests: int, rng: Random, rate: float, burstiness: float) -> Iterator[float]:
    shape, now = 1.0 / burstiness**2, 0.0
    for _ in range(requests):
        if rate:
            now += rng.gammavariate(shape, 1.0 / (rate * shape))
        yield now


def with_deadline(arrivals: Iterable[Arrival], deadline_s: float) -> Iterator[Arrival]:
    """Yield the same requests with a deadline, in seconds from the arrival. Raises TraceError."""
    if not (math.isfinite(deadline_s) and deadline_s > 0):
        raise TraceError(f"the deadline must be above 0 s, got {deadline_s:g}")
    return (replace(each, deadline_s=deadline_s) for each in arrivals)
