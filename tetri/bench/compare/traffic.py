"""The requests of a comparison: times, lengths and the prompts' tokens, the same for all arrangements.

A workload is one of the paper's classes, Mixed, `session` (conversations, whose prompts repeat what was said before),
or a trace. Times are at a rate of one request per second on average, so that any rate has the same requests in the
same order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from math import fsum
from pathlib import Path
from random import Random

from tetri.metrics import percentile
from tetri.sim import workloads
from tetri.sim.traces import TokenCounts, TraceError, replayed

SESSION = "session"
SAMPLE = 4000  # requests whose p90 prompt defines the limits
FIRST_ID = 256  # tokens below may be special, or bytes
HASHED = 512  # tokens of a block with a hash in Mooncake's traces
TURNS, PAUSE = 4, 8.0  # of a session on average: turns, and time between two of them in mean times between requests
OPENING, FOLLOW_UP, REPLY = (TokenCounts("lognormal", *each) for each in ((150, 0.8), (40, 0.7), (90, 0.8)))

Part = tuple[str, int]  # what the tokens are drawn with, and how many


@dataclass(frozen=True, slots=True)
class Timed:
    """A request. `at`: its time, in seconds at one request per second. `parts`: its prompt; equal parts of two requests
    are equal tokens."""

    at: float
    parts: tuple[Part, ...]
    output: int

    @property
    def prompt(self) -> int:
        """Tokens of the prompt."""
        return sum(tokens for _, tokens in self.parts)

    def ids(self, salt: str, vocabulary: int) -> list[int]:
        """The prompt's tokens. With another `salt` it shares no tokens with this one."""
        return [token for part in self.parts for token in _tokens(f"{salt} {part[0]}", part[1], vocabulary)]


def _tokens(key: str, count: int, vocabulary: int) -> list[int]:
    return Random(key).choices(range(min(FIRST_ID, vocabulary - 1), vocabulary), k=count)


@dataclass(frozen=True, slots=True)
class Workload:
    """Where requests come from. `trace`: its file; "": one of the classes, or sessions. `shrink`: the trace's lengths
    are divided by it. `context`: the most tokens of a request; longer ones are left out."""

    name: str
    context: int
    trace: str = ""
    shrink: int = 1

    def draw(self, count: int, seed: int) -> list[Timed]:
        """So many requests. Raises TraceError if the trace has none that fit."""
        if self.trace:
            return _excerpt(_fitting(self), count, Random(f"{self.name} {seed}"))
        if self.name == SESSION:
            return _sessions(count, self.context, Random(f"{self.name} {seed}"))
        return _of_class(self.name, count, self.context, seed)

    @property
    def p90_prompt(self) -> int:
        """Tokens of the p90 prompt."""
        return _p90(self)


@cache
def _p90(workload: Workload) -> int:
    return round(percentile([each.prompt for each in workload.draw(SAMPLE, -1)], 0.9))


def names() -> list[str]:
    """The workloads that need no trace."""
    return [*workloads.load().workloads, SESSION]


def _of_class(name: str, count: int, context: int, seed: int) -> list[Timed]:
    drawn = workloads.load().workloads[name].draw(seed, count)
    made = []
    for number, each in enumerate(drawn):
        prompt = min(each.prompt, context - 1)
        made.append((((f"{seed} {number}", prompt),), min(each.output, context - prompt)))
    return [Timed(at, *each) for at, each in zip(poisson(count, Random(f"{name} {seed} times")), made, strict=True)]


def poisson(count: int, rng: Random) -> list[float]:
    """Times of a Poisson process at exactly one per second: a draw with more load than another would say more about
    the draw than about the arrangement."""
    gaps = [rng.expovariate(1.0) for _ in range(count)]
    scale = count / fsum(gaps)
    return [*accumulate(gap * scale for gap in gaps)]


def _sessions(count: int, context: int, rng: Random) -> list[Timed]:
    """Conversations that begin at random times. The next turn comes after a pause, whether or not the answer is there:
    otherwise a faster server would get other traffic."""
    made: list[Timed] = []
    start, number = 0.0, 0
    while len(made) < 2 * count:  # so many that the first `count` in order of time are complete
        start += rng.expovariate(1 / TURNS)
        made += _session(f"{rng.random()} {number}", start, context, rng)
        number += 1
    made.sort(key=lambda each: each.at)
    return _timed_evenly(made[:count])


def _session(name: str, at: float, context: int, rng: Random) -> Iterator[Timed]:
    parts: tuple[Part, ...] = ()
    while True:
        asked, reply = (FOLLOW_UP if parts else OPENING).draw(rng), REPLY.draw(rng)
        parts += ((f"{name} {len(parts)}", asked),)
        if sum(tokens for _, tokens in parts) + reply > context:
            return
        yield Timed(at, parts, reply)
        if rng.random() < 1 / TURNS:
            return
        parts += ((f"{name} {len(parts)}", reply),)
        at += rng.expovariate(1 / PAUSE)


def _excerpt(rows: Sequence[Timed], count: int, rng: Random) -> list[Timed]:
    """So many requests that follow each other in the trace, from any place on."""
    if count > len(rows):
        raise TraceError(f"the trace has {len(rows)} requests that fit, fewer than {count}: ask for fewer (--requests)")
    first = rng.randrange(len(rows) - count + 1)
    return _timed_evenly(rows[first : first + count])


def _timed_evenly(rows: Sequence[Timed]) -> list[Timed]:
    """The same requests from time 0 on, at one per second on average."""
    whole = (rows[-1].at - rows[0].at) or 1.0
    scale = (len(rows) - 1) / whole
    return [Timed((each.at - rows[0].at) * scale, each.parts, each.output) for each in rows]


@cache
def _fitting(workload: Workload) -> list[Timed]:
    trace, shrink, made = Path(workload.trace), workload.shrink, []
    rows = replayed(trace).arrivals
    hashes = _hashes(trace)
    for number, row in enumerate(rows):
        prompt, output = max(row.prompt // shrink, 1), max(row.output // shrink, 1)
        if prompt + output <= workload.context:
            made.append(Timed(row.at_s, _parts(number, prompt, hashes, shrink), output))
    if not made:
        raise TraceError(f"{trace}: no request fits into {workload.context} tokens: divide its lengths (--shrink)")
    return made


def _parts(number: int, prompt: int, hashes: Sequence[Sequence[int]], shrink: int) -> tuple[Part, ...]:
    if not hashes:
        return ((f"row {number}", prompt),)
    size = max(HASHED // shrink, 1)
    sizes = [size] * (prompt // size) + ([prompt % size] if prompt % size else [])
    known = hashes[number]
    return tuple((f"hash {known[i]}" if i < len(known) else f"row {number} {i}", n) for i, n in enumerate(sizes))


def _hashes(trace: Path) -> list[list[int]]:
    """The hashes of the blocks of each prompt, in order of time; nothing for a trace without. Rows that `replayed`
    skips are skipped."""
    with open(trace, encoding="utf-8-sig") as file:
        if "hash_ids" not in file.readline():
            return []
        file.seek(0)
        rows = [json.loads(line) for line in file if line.strip()]
    rows = [row for row in rows if row["input_length"] and row["output_length"]]
    return [row["hash_ids"] for row in sorted(rows, key=lambda row: float(row["timestamp"]))]
