"""Chunks: how prompts are divided into them (paper, section 3.3.3), and how large one may be beside running decodes
(docs/adaptive.md)."""

from __future__ import annotations

from collections.abc import Sequence

from tetri.cost import StepCost
from tetri.engine_request import Span
from tetri.policy.views import MixedStep, Progress

#: Sizes that are tried beside running decodes, in tokens.
SIZES = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
ALIKE = 1.1  # costs of a token up to this ratio count as equal: less is within the error of a cost table
FLOOR = 0.5  # of what a token costs in a whole chunk alone: less counts as this, as where a small chunk adds nothing
WAIT = 4.0  # divided by the number of decodes: how much a prompt's wait counts, that of a decode being 1
ENDING = 1.25  # as ALIKE, for a chunk that ends a prompt: its last tokens would take another step


def pack(prompts: Sequence[Progress], chunk_tokens: int) -> list[Span]:
    """The next chunk: slice and merge the prompts in order until `chunk_tokens` are full. A chunk can hold the end
    of one prompt and the beginnings of others; only its last span may stop before the prompt's end. Every prompt must
    have tokens left.

    A chunk that is not full runs as it is. The paper pads it with zeros and leaves open whether it could wait for
    further prompts. An engine with paged memory computes any number of tokens, so both would only cost time."""
    spans, budget = [], chunk_tokens
    for prompt in prompts:
        if budget == 0:
            break
        count = min(budget, prompt.goal - prompt.done)
        spans.append(Span(prompt.key, prompt.done, prompt.done + count))
        budget -= count
    return spans


def limit(step: MixedStep, cost: StepCost, most: int) -> int:
    """The size of the next chunk beside running decodes, up to `most` tokens; 0: none. Of the sizes with which the
    decodes keep their limits of TPOT, the one whose tokens cost least. Each decode needs a step without it too, so it
    pays for what it takes longer; the prompt waits for all of it. That wait counts the less, the more decodes there
    are, for then work holds up whoever comes next; but when prompts press, only it counts. Of sizes that are about as
    good, the largest; one that ends a prompt may cost more."""
    if most <= 0:  # decodes take all tokens of the step
        return 0
    share = step.batch**2 / (step.batch**2 + WAIT)
    decode_s = 0.0 if step.pressed else share * cost.step_s((), step.batch, step.context)
    sizes = {**dict.fromkeys((*SIZES, most), ALIKE), **dict.fromkeys(step.ends, ENDING)}
    costs = list[tuple[int, float]]()
    for size in sorted(sizes):
        if size > most:
            break
        seconds = cost.step_s((Span("", step.start, step.start + size),), step.batch, step.context)
        if seconds > step.slack_s:
            break
        costs.append((size, (seconds - decode_s) / size))
    alone_s = cost.step_s((Span("", step.start, step.start + most),), 0, 0)
    least = max(min((token_s for _, token_s in costs), default=0.0), FLOOR * alone_s / most)
    return max((size for size, token_s in costs if token_s <= sizes[size] * least), default=0)
