"""In which order a window of queued prompts is prefilled (paper, section 3.3.1)."""

from __future__ import annotations

from collections.abc import Sequence

from tetri.policy.views import QueuedPrompt


def fcfs(window: Sequence[QueuedPrompt]) -> list[str]:
    """First come, first served."""
    return [prompt.key for prompt in sorted(window, key=lambda prompt: prompt.arrival)]


def sjf(window: Sequence[QueuedPrompt]) -> list[str]:
    """Shortest job first: by prompt tokens, which tell the time of a prefill well; the earlier of equals."""
    return [prompt.key for prompt in sorted(window, key=lambda prompt: (prompt.tokens, prompt.arrival))]


def ljf(window: Sequence[QueuedPrompt]) -> list[str]:
    """Longest job first; the earlier of equals."""
    return [prompt.key for prompt in sorted(window, key=lambda prompt: (-prompt.tokens, prompt.arrival))]
