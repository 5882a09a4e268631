"""What prompts and decode steps take in servers while all of them serve, as their client sees it.

With it the simulator predicts what happens under load. It includes what a table measured on the engine alone leaves
out: HTTP, the time between two steps, and what the other processes on the same CPUs take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from statistics import fmean, median
from typing import NamedTuple

from tetri.bench.compare.arrangements import LEAST
from tetri.bench.compare.load import Answer, Load, question
from tetri.bench.report import BenchError
from tetri.cost import Cost, Curve

PROMPTS, CHUNK = (32, 128, 512, 2048), 512  # tokens
BATCHES, STEPS, SHORT = (1, 4, 16, 32), 16, 32
DEEP, DEEP_BATCH = 1024, 8  # tokens and requests of the decode steps with much context
TIMES = 3  # a prompt of each size
LEAST_SLOWER = 0.5  # of the engine's own time: less is an error of the measurement
Draw = Callable[[int], list[int]]  # makes a prompt of so many tokens that the server has not had


class Seen(NamedTuple):
    """Seconds of prompts alone, by their tokens, and of decode steps, by the requests of an instance; `deep_s`: of a
    step of DEEP_BATCH requests with DEEP tokens each. All instances were about as busy."""

    prompts: dict[int, float]
    steps: dict[int, float]
    deep_s: float

    @property
    def start_s(self) -> float:
        """Seconds more for each token of a chunk and each token before it, of the longest prompt."""
        longest = PROMPTS[-1]
        starts = sum(CHUNK * start for start in range(0, longest, CHUNK))
        return max(self.prompts[longest] - self.prompts[CHUNK] * longest / CHUNK, 0.0) / starts

    @property
    def context_s(self) -> float:
        """Seconds more of a decode step for each token of context."""
        small, large = self.steps[4], self.steps[16]
        plain_s = small + (large - small) * (DEEP_BATCH - 4) / 12
        return max(self.deep_s - plain_s, 0.0) / (DEEP_BATCH * (DEEP - SHORT))


def seen(urls: Sequence[str], instances: int, model: str, draw: Draw) -> Seen:
    """Measure idle servers, which have so many instances together. Raises BenchError if one does not answer."""

    def prompt_s(tokens: int) -> float:
        answers = [_asked(urls, model, [draw(tokens) for _ in range(instances)], 1)[0] for _ in range(TIMES)]
        return median(answer.ttft_s for each in answers for answer in each)

    def step_s(batch: int, tokens: int = SHORT) -> float:
        """The median, so that the steps in which requests begin do not count."""
        prompts = [draw(tokens) for _ in range(instances * batch)]
        return median(_asked(urls, model, prompts, 2 * STEPS)[1])

    return Seen(
        {tokens: prompt_s(tokens) for tokens in PROMPTS},
        {batch: step_s(batch) for batch in BATCHES},
        step_s(DEEP_BATCH, DEEP),
    )


def _asked(
    urls: Sequence[str], model: str, prompts: Sequence[Sequence[int]], output: int
) -> tuple[list[Answer], list[float]]:
    """The answers to these prompts at once, and the times between their events."""
    load = Load(urls, LEAST)
    answers = load.in_flight([question(0.0, model, ids, output) for ids in prompts], len(prompts))
    if bad := next((each for each in answers if each.error), None):
        raise BenchError(f"{urls[bad.server]} does not answer: {bad.error}")
    return answers, load.gaps_s


def of_server(found: Seen, token_bytes: int, kv_tokens: int) -> Cost:
    """The cost table of a server that is not tetri's. `token_bytes`, `kv_tokens`: of its KV."""
    return Cost(
        prefill=_rising(found.prompts),
        decode=_rising(found.steps),
        prefill_start_s=found.start_s,
        decode_context_s=found.context_s,
        kv_token_bytes=token_bytes,
        kv_tokens=kv_tokens,
        chunk_tokens=CHUNK,
        source="as its client sees it",
    )


def of_instance(found: Seen, own: Cost, chunk_tokens: int) -> tuple[Cost, float]:
    """The table of an instance of tetri, whose engine alone has the table `own` and chunks of `chunk_tokens`, and the
    seconds that a request takes besides its steps. The chunks are those of `own`, as much slower as the prompts are."""
    own_s = {tokens: own.prompt_s(tokens, 0, chunk_tokens) for tokens in PROMPTS}
    shortest, small, large = PROMPTS[0], PROMPTS[1], PROMPTS[-1]
    more_s, own_more_s = found.prompts[large] - found.prompts[small], own_s[large] - own_s[small]
    slower = max(more_s / own_more_s, LEAST_SLOWER) if own_more_s > 0.0 else 1.0
    delay_s = max(found.prompts[shortest] - slower * own_s[shortest], 0.0)
    served = replace(
        own,
        prefill=_rising({tokens: slower * seconds for tokens, seconds in own.prefill}),
        decode=_rising(found.steps),
        prefill_start_s=own.prefill_start_s * slower,
        decode_context_s=found.context_s,
        source=f"{own.source}, as a client sees it",
    )
    return served, delay_s


def mean(costs: Sequence[Cost]) -> Cost:
    """The mean of tables with the same points."""
    return replace(
        costs[0],
        prefill=_mean([cost.prefill for cost in costs]),
        decode=_mean([cost.decode for cost in costs]),
        prefill_start_s=fmean(cost.prefill_start_s for cost in costs),
        decode_context_s=fmean(cost.decode_context_s for cost in costs),
    )


def _mean(curves: Sequence[Curve]) -> Curve:
    return tuple((points[0][0], fmean(seconds for _, seconds in points)) for points in zip(*curves, strict=True))


def _rising(points: dict[int, float] | dict[float, float]) -> Curve:
    """A curve of a cost table: it never falls."""
    return tuple(zip(map(float, points), accumulate(points.values(), max), strict=True))
