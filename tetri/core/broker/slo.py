"""The limits of latency of each request: its own, else those of the deployment, else those that the hardware allows."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from math import ceil, inf

from tetri.core.broker.requests import Choice
from tetri.cost import CorrectedCost, Cost
from tetri.request import Slo

SEEN = 500  # prompts of the last requests, from which the usual long one is taken
QUANTILE = 0.9  # the share of them that is not longer
TTFT_TIMES, TPOT_TIMES = 6, 3  # how much longer than on an idle instance may it take, unless a limit is named


class Limiter:
    """Finds the limits of a request when it arrives. Where neither the request nor the deployment names one, it follows
    from the cost table: what the prefill of a long prompt, and a decode step after it, take on an idle instance."""

    def __init__(self, deployment: Slo, cost: Cost | CorrectedCost, chunk_tokens: int) -> None:
        self.deployment, self.cost, self.chunk_tokens = deployment, cost, chunk_tokens
        self._prompts: deque[int] = deque()
        self._sorted: list[int] = []

    def of(self, asked: Slo, prompt: int) -> Slo:
        """The limits of a request that asks for these, with so many prompt tokens. None: it has no limit."""
        self._see(prompt)
        found = self.found
        return Slo(ttft_s=asked.ttft_s or found.ttft_s, tpot_s=asked.tpot_s or found.tpot_s)

    @property
    def found(self) -> Slo:
        """The limits of a request that names none."""
        ttft_s, tpot_s = self.deployment.ttft_s, self.deployment.tpot_s
        if self._sorted and (ttft_s is None or tpot_s is None):
            long = self._sorted[ceil(QUANTILE * len(self._sorted)) - 1]
            ttft_s = ttft_s or TTFT_TIMES * self.cost.prompt_s(long, 0, self.chunk_tokens) or None
            tpot_s = tpot_s or TPOT_TIMES * self.cost.decode_s(1, long) or None
        return Slo(ttft_s=ttft_s, tpot_s=tpot_s)

    def _see(self, prompt: int) -> None:
        self._prompts.append(prompt)
        insort(self._sorted, prompt)
        if len(self._prompts) > SEEN:
            del self._sorted[bisect_left(self._sorted, self._prompts.popleft())]


def left(choice: Choice, now: float) -> Slo:
    """The limits of a choice that is assigned to a prefill instance, with the seconds that are left for the prefill. A
    later attempt has output already: its next token is due when the mean time between two tokens reaches its limit."""
    slo, first_at = choice.request.slo, choice.first_at
    if first_at is None:
        due = None if slo.ttft_s is None else choice.request.arrival + slo.ttft_s
    else:
        due = None if slo.tpot_s is None else first_at + slo.tpot_s * len(choice.output)
    return slo.changed(ttft_s=None if due is None else due - now)


def seconds_left(choice: Choice, now: float) -> float:
    """The seconds that are left for its prefill; infinite without a limit."""
    ttft_s = left(choice, now).ttft_s
    return inf if ttft_s is None else ttft_s


def result(choice: Choice, ttft_s: float | None, jct_s: float) -> str:
    """How an ended choice kept its limits: met, or which it missed (ttft, tpot, both). failed: it ended by an error or
    its deadline. "": its client has cancelled it before it had missed any; it does not count."""
    if choice.reason in ("error", "deadline"):
        return "failed"
    found = choice.request.slo.result(jct_s if ttft_s is None else ttft_s, choice.tpot_s)
    return "" if choice.reason == "cancelled" and found == "met" else found
