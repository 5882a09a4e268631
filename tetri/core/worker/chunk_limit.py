"""How large the next chunk of an adaptive worker may be, by the limits of latency of the requests that it has."""

from __future__ import annotations

from itertools import islice

from tetri.core.decode.batch import Batch
from tetri.core.prefill.scheduler import PrefillScheduler
from tetri.cost import CorrectedCost
from tetri.policy.chunk import limit
from tetri.policy.views import MixedStep

LOOKED_AT = 32  # most queued prompts that are looked at
EARLY = 1.3  # how much faster than just in time prompts are to be computed, since others may arrive meanwhile
PRESSING = 0.5
LATE = 0.1  # share of the limit of TTFT in which a prompt that is late is still to be computed


class ChunkLimit:
    """Limits the chunks of a worker's steps."""

    def __init__(self, prefill: PrefillScheduler, batch: Batch, cost: CorrectedCost) -> None:
        self.prefill, self.batch, self.cost = prefill, batch, cost

    def tokens(self, most: int, now: float) -> int:
        """Return the most prompt tokens of the next step, up to `most`."""
        wanted, pressing = self._wanted(now)
        soon_s, later_s = self.batch.slack_s(now, pressing)
        batch, context = len(self.batch.running), self.batch.forecast.context
        first = next(self.prefill.in_order(), None)
        start = 0 if first is None else first.done
        return limit(MixedStep(batch, context, soon_s, later_s, wanted, start), self.cost, most)

    def _wanted(self, now: float) -> tuple[float, int]:
        """Return the prompt tokens a second with which no queued prompt is late, and how many are about to be."""
        tokens, wanted, pressing = 0, 0.0, 0
        for request in islice(self.prefill.in_order(), LOOKED_AT):
            tokens += request.goal - request.done
            ttft_s = request.slo.ttft_s
            if ttft_s is not None:
                left_s = request.queued.since + ttft_s - now
                pressing += left_s < PRESSING * ttft_s
                left_s = max(left_s, LATE * abs(ttft_s))
                wanted = max(wanted, tokens / left_s if left_s else 0.0)
        return EARLY * wanted, pressing
