"""An upper bound of the rate at which instances can serve requests within a limit of TPOT, however they share the work.

The model is fluid: work can be divided at will, nothing ever waits, and all KV moves at once. An instance spends its
time on steps; a step with a chunk of c prompt tokens beside B decodes takes s(c, B) seconds (the cost table, with the
mean context of a decode). Requests at the rate r, of P prompt tokens and D decode steps on average, can be served if
there are shares of time x(c, B) of N instances with

    sum x c / s >= r P        every prompt is computed
    sum x B / s >= r D'       every timely token is written: D' = share x D
    sum x B (s - tpot) / s <= 0   and takes tpot seconds at most, on average
    sum x <= N - r w          w: the least time of the tokens that may be late

`share` of the requests must be timely; of the others only the marginal time of their tokens counts. The largest r is a
linear program. Its dual is solved here: for any prices a, b, g >= 0 of the first three lines with a P + b D' = 1,

    v(a, b, g) = max over (c, B) of (a c + b B - g B (s - tpot)) / s

bounds r by N / (1 / v + w), so that a search that ends early is still a bound. v is convex in (a, g).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import fsum

from tetri.cost import Cost
from tetri.sim.pools import Lengths

MAX_BATCH = 256
CHUNKS = (64, 128, 192, 256, 320, 384, 512, 768, 1024, 1536, 2048, 4096)
SEARCH = 16  # halvings of the golden section
GOLDEN = (5**0.5 - 1) / 2
Shape = tuple[float, float, float]  # a step: prompt tokens, decodes, seconds


def bound(cost: Cost, lengths: Lengths, tpot_s: float, instances: int, share: float = 0.9) -> float:
    """Requests a second that no arrangement exceeds; 0 if a decode step by itself takes longer than the limit."""
    steps = fsum(output - 1 for _, output in lengths) / len(lengths)
    prompts = fsum(prompt for prompt, _ in lengths) / len(lengths)
    context = _context(lengths)
    shapes = _shapes(cost, lengths, context)
    alone = [shape for shape in shapes if shape[:2] == (0, 1)]
    if steps and alone[0][2] >= tpot_s:
        return 0.0
    late_s = (1 - share) * steps * _marginal_s(cost, context)

    def least(prompt_share: float) -> float:
        """The least v at this a P."""
        a = prompt_share / prompts
        b = (1 - prompt_share) / (share * steps) if steps else 0.0
        if not steps:
            return _value(shapes, a, b, 0.0, tpot_s)
        most = _value(shapes, a, b, 0.0, tpot_s) * alone[0][2] / (tpot_s - alone[0][2])
        return _least(lambda g: _value(shapes, a, b, g, tpot_s), most)

    value = _least(least, 1.0) if steps else least(1.0)
    return instances / (1 / value + late_s)


def split_bound(
    cost: Cost, lengths: Lengths, tpot_s: float, prefill: int, decode: int, chunk: int, share: float = 0.9
) -> float:
    """As `bound`, for instances that do one phase each, with chunks of at most `chunk` tokens."""
    shapes = _shapes(cost, lengths, _context(lengths))
    prompts = fsum(prompt for prompt, _ in lengths) / len(lengths)
    steps = fsum(output - 1 for _, output in lengths) / len(lengths)
    token_s = min(step_s / tokens for tokens, batch, step_s in shapes if not batch and tokens <= chunk)
    rate = prefill / (prompts * token_s)
    timely = [step_s / batch for tokens, batch, step_s in shapes if not tokens and step_s <= tpot_s]
    if not steps:
        return rate
    late_s = (1 - share) * steps * _marginal_s(cost, _context(lengths))
    return min(rate, decode / (share * steps * min(timely) + late_s)) if timely else 0.0


def _context(lengths: Lengths) -> float:
    """Mean tokens of context of a request, over the decode steps of all."""
    total = fsum((output - 1) * (prompt + output / 2) for prompt, output in lengths)
    return total / (fsum(output - 1 for _, output in lengths) or 1.0)


def _shapes(cost: Cost, lengths: Lengths, context: float) -> list[Shape]:
    """The steps that can be best: the corners of the curves, and batches that are close to each other."""
    most = max(min(MAX_BATCH, int(cost.kv_tokens / max(context, 1.0))), 1) if cost.kv_tokens else MAX_BATCH
    corners = {int(batch) for batch, _ in cost.decode if batch <= most}
    batches = sorted({*range(min(17, most + 1)), *range(0, most + 1, 8), most, *corners})
    chunks = sorted({0, *CHUNKS, *(int(tokens) for tokens, _ in cost.prefill if tokens >= 1)})
    start_s = {chunk: cost.prefill_start_s * chunk * _before(lengths, chunk) if chunk else 0.0 for chunk in chunks}
    first = dict(cost.prefill) | {0: 0.0}
    curve = {chunk: first[chunk] if chunk in first else cost.prompt_s(chunk, 0, chunk) for chunk in chunks}
    made: list[Shape] = []
    for batch in batches:
        decode_s = cost.decode_s(batch, round(batch * context))
        for chunk in chunks:
            chunk_s = curve[chunk] + start_s[chunk]
            both = chunk_s + decode_s - min(chunk_s, cost.decode_s(1, 0)) if chunk and batch else chunk_s + decode_s
            if both:
                made.append((chunk, batch, both))
    return made


def _before(lengths: Lengths, chunk: int) -> float:
    """Mean number of earlier tokens of its prompt before a chunk, over the prompt tokens of all."""
    pairs = 0
    for prompt, _ in lengths:
        whole, rest = divmod(prompt, chunk)
        pairs += chunk * chunk * (whole * (whole - 1) // 2) + rest * chunk * whole
    return pairs / fsum(prompt for prompt, _ in lengths)


def _marginal_s(cost: Cost, context: float) -> float:
    """The least seconds that one more decode adds to a step."""
    slopes = [
        (after - before) / (more - less)
        for (less, before), (more, after) in zip(cost.decode, cost.decode[1:], strict=False)
        if less < MAX_BATCH
    ]
    return min(slopes, default=0.0) + cost.decode_context_s * context


def _value(shapes: Sequence[Shape], a: float, b: float, g: float, tpot_s: float) -> float:
    timely = b + g * tpot_s
    return max((a * chunk + timely * batch) / step_s - g * batch for chunk, batch, step_s in shapes)


def _least(function: Callable[[float], float], most: float) -> float:
    """The least value of a convex function between 0 and `most`, found by golden section."""
    low, high = 0.0, most
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    at_left, at_right = function(left), function(right)
    best = min(at_left, at_right, function(low))
    for _ in range(SEARCH):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - GOLDEN * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + GOLDEN * (high - low)
            at_right = function(right)
        best = min(best, at_left, at_right)
    return best
