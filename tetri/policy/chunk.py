"""How prompts are cut into chunks (paper, section 3.3.3)."""

from __future__ import annotations

from collections.abc import Sequence

from tetri.engine_request import Span
from tetri.policy.views import Progress


def pack(prompts: Sequence[Progress], chunk_tokens: int) -> list[Span]:
    """The next chunk: slice and merge the prompts in order until `chunk_tokens` are full. It may hold the tail
    of one prompt and the heads of others; only its last span may stop short of the prompt's end. Every prompt has
    tokens left.

    A chunk that the prompts do not fill runs as it is. The paper pads it with zeros, and leaves open whether it could
    wait for the next prompts: an engine with paged memory computes any number of tokens, so both only cost time."""
    spans, budget = [], chunk_tokens
    for prompt in prompts:
        if budget == 0:
            break
        count = min(budget, prompt.goal - prompt.done)
        spans.append(Span(prompt.key, prompt.done, prompt.done + count))
        budget -= count
    return spans
