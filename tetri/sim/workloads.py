"""The paper's closed batches: seeded draws of prompt and output lengths by class, from conf/paper/workloads.toml.

A length is drawn from the distribution f of Figure 1, cut to the borders of its class and tilted to the class's mean:
p(x) ~ f(x) exp(t x). Of all distributions with this mean it is the closest to f.
"""

from __future__ import annotations

import math
import tomllib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

from tetri.sim.traces import Arrival

Quantiles = Sequence[tuple[float, float]]  # (share, tokens), both ascending, from share 0 to 1


class WorkloadError(ValueError):
    """The workloads file cannot be read; one line that says what is wrong."""


@dataclass(frozen=True, slots=True)
class LengthMix:
    """A distribution of lengths in tokens: `below[i]` is the share of lengths up to `low` + i."""

    low: int
    below: tuple[float, ...]

    def draw(self, rng: Random) -> int:
        """Draw a number of tokens."""
        place = bisect_left(self.below, rng.random() * self.below[-1])
        return self.low + min(place, len(self.below) - 1)

    @property
    def mean(self) -> float:
        """The mean length in tokens."""
        shares = (after - before for before, after in zip((0.0, *self.below), self.below, strict=False))
        return sum((self.low + i) * share for i, share in enumerate(shares)) / self.below[-1]


@dataclass(frozen=True, slots=True)
class Workload:
    """A closed batch: `requests` requests that all arrive at time 0. Prompt and output lengths are drawn independently;
    the output is cut to the model's `context`."""

    name: str
    requests: int
    context: int
    prompt: LengthMix
    output: LengthMix

    def draw(self, seed: int, requests: int = 0) -> list[Arrival]:
        """Draw the batch; `requests` 0: as many as in the paper."""
        rng = Random(f"{self.name} {seed}")
        drawn = []
        for _ in range(requests or self.requests):
            prompt, output = self.prompt.draw(rng), self.output.draw(rng)
            drawn.append(Arrival(0.0, prompt, min(output, self.context - prompt)))
        return drawn


def tilted(quantiles: Quantiles, low: int, high: int, mean: float) -> LengthMix:
    """Return the distribution with these quantiles, cut to `low` to `high` tokens and tilted to `mean`. Raises
    WorkloadError if no tilt gives that mean."""
    shares = [_share(quantiles, x) - _share(quantiles, x - 1) for x in range(low, high + 1)]
    if not low < mean < high or min(shares) <= 0:
        raise WorkloadError(f"mean {mean:g} must be between {low} and {high}, and the quantiles must rise there")
    least, most = -1.0, 1.0  # per token: far more than lengths of hundreds of tokens need
    for _ in range(60):
        tilt = (least + most) / 2
        weights = _weights(shares, tilt)
        if sum((low + i) * w for i, w in enumerate(weights)) < mean * math.fsum(weights):
            least = tilt
        else:
            most = tilt
    return LengthMix(low, tuple(accumulate(weights)))


def _weights(shares: Sequence[float], tilt: float) -> list[float]:
    last = len(shares) - 1 if tilt > 0 else 0  # keeps the largest exponent at 0, so that nothing overflows
    return [share * math.exp(tilt * (i - last)) for i, share in enumerate(shares)]


def _share(quantiles: Quantiles, tokens: float) -> float:
    """Return the share of lengths up to `tokens`, interpolated linearly between the quantiles."""
    places = [place for _, place in quantiles]
    right = min(max(bisect_left(places, tokens), 1), len(quantiles) - 1)
    (p0, x0), (p1, x1) = quantiles[right - 1], quantiles[right]
    return p0 + (p1 - p0) * min(max((tokens - x0) / (x1 - x0), 0.0), 1.0)


@dataclass(frozen=True, slots=True)
class Baseline:
    """The paper's vLLM: concurrent requests, the most prompt tokens in one iteration, and the extra seconds of an
    iteration with prompts."""

    slots: int
    step_tokens: int
    join_s: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The workloads and the baseline of the paper's evaluation, as far as they are known or fitted."""

    workloads: dict[str, Workload]
    baseline: Baseline


def default_file() -> Path:
    """Return the path of conf/paper/workloads.toml."""
    return Path(__file__).parents[2] / "conf" / "paper" / "workloads.toml"


def load(path: str | Path = "") -> Evaluation:
    """Read the workloads file, by default `default_file`. The workloads keep its order. Raises WorkloadError."""
    where = Path(path or default_file())
    try:
        table = tomllib.loads(where.read_text(encoding="utf-8"))
        sources = {name: _quantiles(table["figure1"][name]) for name in ("prompt", "output")}
        made = {name: _workload(name, rows, sources, table["context"]) for name, rows in table["workload"].items()}
        return Evaluation(made, Baseline(**table["baseline"]))
    except OSError as error:
        raise WorkloadError(f"{where}: cannot be read: {error.strerror}") from None
    except (KeyError, TypeError, ValueError) as error:  # ValueError includes TOML errors and WorkloadError
        raise WorkloadError(f"{where}: not a workloads file: {error}") from None


def _quantiles(rows: Sequence[Sequence[float]]) -> Quantiles:
    points = [(float(share), float(tokens)) for share, tokens in rows]
    if points[0][0] != 0 or points[-1][0] != 1 or points != sorted(points):
        raise ValueError("quantiles must rise from share 0 to share 1")
    return points


def _workload(name: str, table: dict[str, Any], sources: dict[str, Quantiles], context: int) -> Workload:
    known = ("requests", "prompt", "output", "prompt_mean", "output_mean")
    if set(table) != set(known):
        raise ValueError(f"{name}: must have exactly the keys {', '.join(known)}")
    lengths = []
    for part in ("prompt", "output"):
        low, high = table[part]
        lengths.append(tilted(sources[part], int(low), int(high), float(table[f"{part}_mean"])))
    return Workload(name, int(table["requests"]), context, *lengths)
