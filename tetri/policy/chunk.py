"""Chunk packing: how prompts are divided into chunks (paper, section 3.3.3)."""

from __future__ import annotations

from collections.abc import Sequence

from tetri.engine_request import Span
from tetri.policy.views import Progress


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
