"""How large the next chunk of an adaptive worker may be, by the limits of latency of the requests that it has."""

from __future__ import annotations

from itertools import accumulate, islice, takewhile
from math import inf

from tetri.core.decode.batch import Batch
from tetri.core.prefill.request import PrefillRequest
from tetri.core.prefill.scheduler import PrefillScheduler
from tetri.cost import CorrectedCost
from tetri.policy.chunk import limit
from tetri.policy.views import MixedStep

LOOKED_AT = 32  # most queued prompts that are looked at
PRESSING = 0.5  # a prompt presses when it has waited for this share of its limit of TTFT,
PATIENT = 3.0  # or for so many times as long as it takes to compute it alone, if that is sooner
AIMED = 0.95  # of a limit of TPOT: steps take a little longer than predicted
EXPECTED = 2.0  # times the usual output: tokens in which a request may catch up; what runs is mostly long
GAINED = 0.3  # of its limit, at least, in each of these: the batch gets smaller when no prompts join it


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
        free = self.prefill.ledger.free - self.batch.growth()
        pressing = sum(_presses(request, now) for request in queued if request.running or request.flow.blocks <= free)
        running = self.batch.running.values()
        context = sum([request.size for request in running])
        slack_s = self.slack_s(self.cost.decode_s(len(running), context), now, pressing)
        return limit(MixedStep(len(running), context, slack_s, pressing > 0, start, tuple(ends)), self.cost, most)

    def slack_s(self, step_s: float, now: float, skipped: int) -> float:
        """Return how long the next step may take so that the running requests keep their limits of TPOT, with what
        they catch up with in EXPECTED times the usual output; infinite without limits. The `skipped` requests with the
        least slack do not count, nor those that cannot keep their limits any more. `step_s`: a step without a chunk."""
        more, slacks = EXPECTED * self.batch.forecast.usual_output, list[float]()
        limit_s, tpot_s, gained_s = None, 0.0, 0.0
        for request in self.batch.running.values():
            if request.offer.tpot_s is not None:
                if request.offer.tpot_s != limit_s:  # mostly all have the same
                    limit_s = request.offer.tpot_s
                    tpot_s = AIMED * limit_s
                    gained_s = more * max(tpot_s - step_s, GAINED * tpot_s)
                slack_s = request.first_at - now + len(request.tokens) * tpot_s + gained_s
                if slack_s >= step_s:
                    slacks.append(slack_s)
        slacks.sort()
        return slacks[skipped] if skipped < len(slacks) else inf


def _presses(request: PrefillRequest, now: float) -> bool:
    ttft_s = request.slo.ttft_s
    return ttft_s is not None and now - request.queued.since > min(PRESSING * ttft_s, PATIENT * request.queued.work_s)
