"""In which order queued prompts are prefilled (paper, section 3.3.1). An order is a rank: the lowest goes first.

A rank never changes while a prompt waits, so that whoever keeps a queue may sort once, or insert. That is also why
`ageing` needs no clock: waiting prompts age together, only the moment at which each began to wait tells them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tetri.policy.views import QueuedPrompt

Rank = tuple[float, int]  # the second is the order of arrival, so that no two prompts are equal


@dataclass(frozen=True, slots=True)
class Order:
    """`rank` of one prompt, given `Rules.stretch`. `windowed`: windows of `Rules.sched_batch` prompts are ranked one
    after the other and never mix, which bounds how long a prompt is passed over. Without windows all prompts that
    have not started are ranked together, at each chunk; then the rank itself has to bound the waiting."""

    rank: Callable[[QueuedPrompt, float], Rank]
    windowed: bool

    def keys(self, window: Sequence[QueuedPrompt], stretch: float) -> list[str]:
        """The keys of these prompts, in the order in which they are to be prefilled."""
        return [prompt.key for prompt in sorted(window, key=lambda prompt: self.rank(prompt, stretch))]


def fcfs(prompt: QueuedPrompt, stretch: float) -> Rank:
    """First come, first served."""
    return 0.0, prompt.arrival


def sjf(prompt: QueuedPrompt, stretch: float) -> Rank:
    """Shortest job first: by prompt tokens, which tell the time of a prefill well; the earlier of equals."""
    return prompt.tokens, prompt.arrival


def ljf(prompt: QueuedPrompt, stretch: float) -> Rank:
    """Longest job first; the earlier of equals."""
    return -prompt.tokens, prompt.arrival


def ageing(prompt: QueuedPrompt, stretch: float) -> Rank:
    """Short ones first, but whoever waits gets older: by the moment at which a prompt will have waited `stretch` times
    as long as its own work takes. Only prompts that come before that moment can go first, so it is passed over for
    `stretch` x `work_s` seconds at most. 0 is FCFS, a very large `stretch` SJF. Not in the paper, whose windows bound
    the waiting by count, and give up most of what SJF gains when windows are small (figure 16)."""
    return prompt.since + stretch * prompt.work_s, prompt.arrival


def deadline(prompt: QueuedPrompt, stretch: float) -> Rank:
    """Earliest deadline first. A prompt without one has the moment of `ageing` for it: an instant of the same clock,
    so the two kinds mix, and deadlines that come in later than it cannot hold it up. The paper stores the SLA of a
    request and uses it nowhere."""
    return (prompt.due, prompt.arrival) if prompt.due is not None else ageing(prompt, stretch)
