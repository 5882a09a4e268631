"""Requests for the simulator: read from a trace file or drawn at random."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice
from pathlib import Path
from random import Random

from tetri.request import Sampling
from tetri.sim.texts import RecordedText

HEADER = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]
_CLOCK = 19  # characters of "2023-11-16 18:15:46"
LONGEST = 10_000_000  # the most tokens of a prompt or an output
MOST = 100_000_000  # the most requests of one run
LAST_S = 1e9  # the latest arrival: 30 years


class TraceError(ValueError):
    """The requests cannot be read or drawn; one line that says what is wrong."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request. `at_s`: arrival time; `prompt` and `output`: tokens; `deadline_s`: seconds from the arrival to the
    deadline. Without a `text` it asks for exactly `output` tokens. With one it asks for at most `text.limit` tokens and
    ends after the text's `output` tokens, which only the engine and an oracle know. `sampling`: only used with faults,
    where tokens are computed; `output` is then its `max_tokens`."""

    at_s: float
    prompt: int
    output: int
    deadline_s: float | None = None
    text: RecordedText | None = None
    sampling: Sampling | None = None


# ---------------------------------------------------------------- traces


def replayed(path: str | Path, speedup: float = 1.0, requests: int = 0) -> Iterator[Arrival]:
    """Yield the requests of a CSV file with the columns of `HEADER`, as in the Azure LLM inference traces. The first
    arrives at time 0; the times between requests are divided by `speedup`. `requests` 0: each line once; else this many
    requests, with the trace repeated as often as necessary; two rounds are separated by the mean time between requests.
    The file is read lazily, and once. Raises TraceError with the number of the wrong line."""
    if not (math.isfinite(speedup) and speedup > 0):
        raise TraceError(f"the speedup must be above 0, got {speedup:g}")
    if requests:
        _check_number(requests)
    endless = _repeated(Path(path), speedup)
    return islice(endless, requests) if requests else _lines(Path(path), speedup)


def _check_number(requests: int) -> None:
    if not 1 <= requests <= MOST:
        raise TraceError(f"the number of requests must be at least 1 and at most {MOST}, got {requests}")


def _repeated(path: Path, speedup: float) -> Iterator[Arrival]:
    whole = []
    for arrival in _lines(path, speedup):
        whole.append(arrival)
        yield arrival
    last = whole[-1].at_s
    round_s = last + (last / (len(whole) - 1) if len(whole) > 1 else 1.0)
    shift = 0.0
    while True:
        shift += round_s
        for arrival in whole:
            yield Arrival(shift + arrival.at_s, arrival.prompt, arrival.output)


def _lines(path: Path, speedup: float) -> Iterator[Arrival]:
    first = last = None
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file)
            if next(rows, None) != HEADER:
                raise TraceError(f"{path}:1: the first line must be {','.join(HEADER)}")
            for row in rows:
                if not row:
                    continue  # editors leave an empty line at the end
                where = f"{path}:{rows.line_num}"
                when, prompt, output = _parsed(row, where)
                first = when if first is None else first
                if last is not None and when < last:
                    raise TraceError(f"{where}: {row[0]} is earlier than the line before")
                last = when
                if (when - first) / speedup > LAST_S:
                    raise TraceError(f"{where}: {(when - first) / speedup:g} s after the first: use a larger speedup")
                yield Arrival((when - first) / speedup, prompt, output)
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise TraceError(f"{path}: not a CSV file: {error}") from None
    if last is None:
        raise TraceError(f"{path}: the trace has no requests: it needs at least one line of {','.join(HEADER)}")


def _parsed(row: list[str], where: str) -> tuple[float, int, int]:
    """Return (seconds, prompt tokens, output tokens) of one line. Raises TraceError."""
    try:
        when, prompt, output = row
        tokens = int(prompt), int(output)
        if min(tokens) < 1 or max(tokens) > LONGEST:
            raise ValueError
        return _seconds(when), *tokens
    except ValueError:
        shown = ",".join(row)
        shown = shown if len(shown) <= 80 else f"{shown[:80]}..."
        wanted = f"a time and two numbers of tokens from 1 to {LONGEST}"
        raise TraceError(f"{where}: must be {wanted}, got {shown!r}") from None


def _seconds(text: str) -> float:
    """Parse a time such as "2023-11-16 18:15:46.6805900", with any number of digits and optionally "+00:00" (as in
    Azure's traces of 2024). Raises ValueError."""
    fraction = text[_CLOCK:].removesuffix("+00:00")
    if fraction and not (fraction[0] == "." and fraction[1:].isdigit()):
        raise ValueError(text)
    whole = datetime.fromisoformat(text[:_CLOCK]) - datetime(2000, 1, 1)
    return whole.total_seconds() + float(f"0{fraction}" if fraction else 0)


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
