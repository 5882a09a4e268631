"""Prefill order policies: the order in which queued prompts are prefilled (paper, section 3.3.1). A policy ranks each
prompt; the lowest rank goes first.

A rank never changes while a prompt waits, so a queue can sort once or insert. For the same reason `ageing` needs no
clock: all waiting prompts age at the same speed, so only the time at which each began to wait matters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tetri.policy.views import QueuedPrompt

Rank = tuple[float, int]  # the second element is the order of arrival, so that no two ranks are equal


@dataclass(frozen=True, slots=True)
class Order:
    """An order policy. `rank` maps a prompt and `Rules.stretch` to its rank. `windowed`: windows of `Rules.sched_batch`
    prompts are ranked one after the other and never mix, which bounds the wait of a prompt. Otherwise all prompts that
    have not started are ranked together at each chunk, and the rank itself must bound the wait."""

    rank: Callable[[QueuedPrompt, float], Rank]
    windowed: bool

    def keys(self, window: Sequence[QueuedPrompt], stretch: float) -> list[str]:
        """The keys of these prompts, in the order of prefill."""
        return [prompt.key for prompt in sorted(window, key=lambda prompt: self.rank(prompt, stretch))]


def fcfs(prompt: QueuedPrompt, stretch: float) -> Rank:
    """First come, first served."""
    return 0.0, prompt.arrival


def sjf(prompt: QueuedPrompt, stretch: float) -> Rank:
    """Shortest job first, by prompt tokens, which predict the prefill time well; on a tie the earlier one."""
    return prompt.tokens, prompt.arrival


def ljf(prompt: QueuedPrompt, stretch: float) -> Rank:
    """Longest job first, by prompt tokens; on a tie the earlier one."""
    return -prompt.tokens, prompt.arrival


def ageing(prompt: QueuedPrompt, stretch: float) -> Rank:
    """Short prompts first, with ageing: ranks by the time at which a prompt will have waited `stretch` times as long as
    its own prefill takes. Only prompts that arrive before that time can go first, so later arrivals delay a prompt by
    `stretch` x `work_s` seconds at most. `stretch` 0 is FCFS, a very large one SJF. Not in the paper, which bounds the
    wait by windows; small windows lose most of the gain of SJF (figure 16)."""
    return prompt.since + stretch * prompt.work_s, prompt.arrival


def adaptive(prompt: QueuedPrompt, stretch: float) -> Rank:
    """As `ageing`, on an adaptive instance. One in a fixed role uses `fcfs` instead (`rules.order_of`): it is measured
    by high percentiles of TTFT, which `ageing` makes longer where prompts wait. Not in the paper."""
    return ageing(prompt, stretch)


def deadline(prompt: QueuedPrompt, stretch: float) -> Rank:
    """First the prompt whose limit of TTFT, or deadline, comes first. One with neither uses its `ageing` time instead:
    all are times of the same clock, so all prompts can be compared, and later limits cannot delay it. The paper stores
    the SLA of a request, but no policy uses it."""
    return (prompt.due, prompt.arrival) if prompt.due is not None else ageing(prompt, stretch)
