"""How large the next chunk of an adaptive worker may be, by the limits of latency of the requests that it has."""

from __future__ import annotations

from itertools import accumulate, islice, takewhile

from tetri.core.decode.batch import Batch
from tetri.core.prefill.request import PrefillRequest
from tetri.core.prefill.scheduler import PrefillScheduler
from tetri.cost import CorrectedCost
from tetri.policy.chunk import limit
from tetri.policy.views import MixedStep

LOOKED_AT = 32  # most queued prompts that are looked at
PRESSING = 0.5  # a prompt presses when it has waited for this share of its limit of TTFT,
PATIENT = 3.0  # or for so many times as long as it takes to compute it alone, if that is sooner


class ChunkLimit:
    """Limits the chunks of a worker's steps."""

    def __init__(self, prefill: PrefillScheduler, batch: Batch, cost: CorrectedCost) -> None:
        self.prefill, self.batch, self.cost = prefill, batch, cost

    def tokens(self, most: int, now: float) -> int:
        """Return the most prompt tokens of the next step, up to `most`. For each prompt that presses, one decode may
        miss its limit."""
        queued = [*islice(self.prefill.in_order(), LOOKED_AT)]
        start, left = queued[0].done if queued else 0, [request.goal - request.done for request in queued]
        ends = takewhile(lambda size: size <= most, accumulate(left))
        pressing = sum(_presses(request, now) for request in queued)
        batch, slack_s = self.batch, self.batch.slack_s(now, pressing)
        context = batch.forecast.context
        step = MixedStep(len(batch.running), context, slack_s, pressing > 0, start, tuple(ends))
        return limit(step, self.cost, most)


def _presses(request: PrefillRequest, now: float) -> bool:
    ttft_s = request.slo.ttft_s
    return ttft_s is not None and now - request.queued.since > min(PRESSING * ttft_s, PATIENT * request.queued.work_s)
