"""How large the next chunk of an adaptive worker may be, by the limits of latency of the requests that it has."""

from __future__ import annotations

from itertools import islice

from tetri.core.decode.batch import Batch
from tetri.core.prefill.scheduler import PrefillScheduler
from tetri.cost import CorrectedCost
from tetri.policy.chunk import limit
from tetri.policy.views import MixedStep

LOOKED_AT = 32  # most queued prompts that are looked at
PRESSING = 0.5  # a prompt presses when it has waited for this share of its limit of TTFT


class ChunkLimit:
    """Limits the chunks of a worker's steps."""

    def __init__(self, prefill: PrefillScheduler, batch: Batch, cost: CorrectedCost) -> None:
        self.prefill, self.batch, self.cost = prefill, batch, cost

    def tokens(self, most: int, now: float) -> int:
        """Return the most prompt tokens of the next step, up to `most`. For each prompt that presses, one decode may
        miss its limit."""
        first = next(self.prefill.in_order(), None)
        start = 0 if first is None else first.done
        pressing = self._pressing(now)
        slack_s = self.batch.slack_s(now, pressing)
        step = MixedStep(len(self.batch.running), self.batch.forecast.context, slack_s, pressing > 0, start)
        return limit(step, self.cost, most)

    def _pressing(self, now: float) -> int:
        queued = islice(self.prefill.in_order(), LOOKED_AT)
        limits = [(request.queued.since, request.slo.ttft_s) for request in queued]
        return sum(ttft_s is not None and now - since > PRESSING * ttft_s for since, ttft_s in limits)
