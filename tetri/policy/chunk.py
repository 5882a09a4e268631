"""Chunks: how prompts are divided into them (paper, section 3.3.3), and how large one may be beside running decodes
(docs/adaptive.md)."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from tetri.cost import StepCost
from tetri.engine_request import Span
from tetri.policy.views import MixedStep, Progress

#: Sizes that are tried beside running decodes, in tokens.
SIZES = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)


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
    decodes keep their limits of TPOT, the one with the best prefill rate."""
    best, rate = 0, 0.0
    for size in (*(size for size in SIZES if size < most), most):
        seconds = cost.step_s((Span("", step.start, step.start + size),), step.batch, step.context)
        if seconds > step.slack_s:
            break
        if not seconds or size > rate * seconds:  # without a cost table, all steps take no time
            best, rate = size, size / seconds if seconds else inf
    return best
