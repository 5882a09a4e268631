"""How large the next chunk of an adaptive worker may be, by the limits of latency of the requests that it runs."""

from __future__ import annotations

from itertools import islice

from tetri.core.decode.batch import Batch
from tetri.core.instance.identity import Identity
from tetri.core.prefill.scheduler import PrefillScheduler
from tetri.cost import CorrectedCost
from tetri.policy.chunk import limit
from tetri.policy.views import MixedStep

GAINED = 0.5  # share of the tokens that a decode is expected to write yet in which it may catch up
LOOKED_AT = 32  # most queued prompts that are looked at
PRESSED = 2.0


class ChunkLimit:
    """Limits chunks beside running decodes."""

    def __init__(self, prefill: PrefillScheduler, batch: Batch, cost: CorrectedCost) -> None:
        self.own: Identity = prefill.own
        self.prefill, self.batch, self.cost = prefill, batch, cost

    def tokens(self, most: int, now: float) -> int:
        """Return the most prompt tokens of the next step, up to `most`."""
        batch, context = len(self.batch.running), self.batch.forecast.context
        step_s = self.cost.decode_s(batch, context)
        ahead, later = self.batch.ahead_s(now, step_s, GAINED * self.batch.forecast.usual_output)
        first = next(self.prefill.in_order(), None)
        start = 0 if first is None else first.done
        return limit(MixedStep(batch, context, ahead, later, self._wanted(now), start), self.cost, most)

    def _wanted(self, now: float) -> float:
        """Return the prompt tokens per second with which no queued prompt is late."""
        tokens, wanted = 0, 0.0
        for request in islice(self.prefill.in_order(), LOOKED_AT):
            tokens += request.goal - request.done
            if request.slo.ttft_s is not None:
                left_s = request.queued.since + request.slo.ttft_s - now
                wanted = max(wanted, tokens / max(left_s, 0.1 * request.slo.ttft_s, 0.001))
        return PRESSED * wanted
