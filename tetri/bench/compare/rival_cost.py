"""The cost table of a server that is not tetri's, as its client sees it: what prompts and decode steps take there.

With it the simulator predicts what such servers do under load. The times include the server's HTTP and whatever else
its step waits for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from statistics import median

from tetri.bench.compare.load import Load, question
from tetri.bench.report import BenchError
from tetri.cost import Cost, Curve

PROMPTS, CHUNK = (32, 128, 512, 2048), 512  # tokens
BATCHES, STEPS, SHORT = (1, 4, 16, 32), 16, 32
DEEP, DEEP_BATCH = 1024, 8  # tokens and requests of the decode steps with much context
TIMES = 3  # a prompt of each size
Draw = Callable[[int], list[int]]  # makes a prompt of so many tokens that the server has not had


def rival_cost(url: str, model: str, draw: Draw, token_bytes: int, kv_tokens: int) -> Cost:
    """Measure an idle server. `token_bytes`, `kv_tokens`: of its KV. Raises BenchError if it does not answer."""
    alone = {tokens: median(_prompt_s(url, model, draw(tokens)) for _ in range(TIMES)) for tokens in PROMPTS}
    steps = {batch: _step_s(url, model, [draw(SHORT) for _ in range(batch)]) for batch in BATCHES}
    deep_s = _step_s(url, model, [draw(DEEP) for _ in range(DEEP_BATCH)])
    small, large = steps[4], steps[16]
    plain_s = small + (large - small) * (DEEP_BATCH - 4) / 12
    longest = PROMPTS[-1]
    starts = sum(CHUNK * start for start in range(0, longest, CHUNK))  # chunk tokens times tokens before them
    return Cost(
        prefill=_rising(alone),
        decode=_rising(steps),
        prefill_start_s=max(alone[longest] - alone[CHUNK] * longest / CHUNK, 0.0) / starts,
        decode_context_s=max(deep_s - plain_s, 0.0) / (DEEP_BATCH * (DEEP - SHORT)),
        kv_token_bytes=token_bytes,
        kv_tokens=kv_tokens,
        chunk_tokens=CHUNK,
        source=f"{url}, as its client sees it",
    )


def _rising(points: dict[int, float]) -> Curve:
    """A curve of a cost table: it never falls."""
    return tuple(zip(map(float, points), accumulate(points.values(), max), strict=True))


def _prompt_s(url: str, model: str, ids: Sequence[int]) -> float:
    (answer,) = Load([url], "").in_flight([question(0.0, model, ids, 1)], 1)
    if answer.error:
        raise BenchError(f"{url} does not answer: {answer.error}")
    return answer.ttft_s


def _step_s(url: str, model: str, prompts: Sequence[Sequence[int]]) -> float:
    """Seconds of a decode step of these requests: the median, so that the steps in which they begin do not count."""
    load = Load([url], "")
    answers = load.in_flight([question(0.0, model, ids, 2 * STEPS) for ids in prompts], len(prompts))
    if error := next((each.error for each in answers if each.error), ""):
        raise BenchError(f"{url} does not answer: {error}")
    return median(load.gaps_s)
