"""What a worker reports about itself: registration and heartbeat to the broker, load report to the monitor."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from statistics import median_high

from tetri.core.actions import BROKER, Publish, Send
from tetri.core.decode.batch import Batch
from tetri.core.decode.scheduler import DecodeScheduler
from tetri.core.instance.activity import ActivityLog
from tetri.core.instance.identity import Identity
from tetri.core.prefill.scheduler import PrefillScheduler
from tetri.cost import CURVES, CorrectedCost, Cost
from tetri.engine_request import Span, StepDone
from tetri.request import StepRatio
from tetri.wire.load import Load
from tetri.wire.messages import CostTable, Heartbeat, Hold, LoadReport, Ready

LISTED = 1000  # most requests that a heartbeat lists, on average
LEAST, MOST = 3, 31  # steps of a phase that were compared before it has a ratio, and the last ones that count


class StepTimes:
    """Compares the time of engine steps with the cost table, and corrects predictions by that. The ratio of a phase is
    the median of its last steps, so that a slow first step, or one in which the machine stood still, does not matter. A
    step with both phases counts for the one with the larger predicted time, without the time of the other.

    A comparison looks at the whole batch. So of the steps with a chunk, and of those without, only the first after each
    heartbeat is compared."""

    def __init__(self, own: Identity, batch: Batch, cost: CorrectedCost) -> None:
        self.own, self.batch, self.cost = own, batch, cost
        self._ratios: dict[str, deque[float]] = {"prefill": deque(maxlen=MOST), "decode": deque(maxlen=MOST)}
        self._compared: set[bool] = set()  # with a chunk, without

    def step_done(self, done: StepDone, seconds: float) -> None:
        """Compare a step that took `seconds`, unless one of its kind was. The batch must not have its tokens yet."""
        chunked = bool(done.spans)
        if chunked not in self._compared and (chunked or done.tokens) and self.own.compares_steps:
            self._compared.add(chunked)
            self._compare(done, seconds)

    def _compare(self, done: StepDone, seconds: float) -> None:
        table, running = self.cost.table, self.batch.running
        sizes = [running[sampled.key].size for sampled in done.tokens if sampled.key in running]
        batch, context = len(sizes), sum(sizes)
        if done.spans:
            predicted = table.step_s(done.spans, batch, context)
        else:
            predicted = table.decode_run_s(batch, context, done.steps)
        if not predicted:
            return
        chunk = table.chunk_s(done.spans)
        parts = {"prefill": chunk, "decode": predicted - chunk}  # as in CorrectedCost.step_s
        phase, other = ("prefill", "decode") if chunk > predicted / 2 else ("decode", "prefill")
        known = _median(self._ratios[other])
        if known is not None:
            seconds, predicted = max(seconds - known * parts[other], 0.0), parts[phase]
        self._ratios[phase].append(seconds / predicted)

    def report(self) -> StepRatio:
        """The ratios for a heartbeat. From now on, predictions are corrected by them."""
        self._compared.clear()
        found = StepRatio(**{phase: _median(ratios) for phase, ratios in self._ratios.items()})
        self.cost.correct(found.prefill, found.decode)
        return found


def _table(cost: Cost) -> CostTable:
    curves = {name: [[*map(float, pair)] for pair in getattr(cost, name)] for name in CURVES}
    return CostTable(**curves, prefill_start_s=cost.prefill_start_s, decode_context_s=cost.decode_context_s)


def _median(ratios: deque[float]) -> float | None:
    return median_high(ratios) if len(ratios) >= LEAST else None


def _middle(limits: Iterable[float | None]) -> float:
    found = [limit for limit in limits if limit is not None]
    return median_high(found) if found else 0.0


class LoadReporter:
    """Makes a worker's reports. `role` decides which new work others send; `flip` is the number of the Flip that set
    it, 0 before the first. `busy`: the share of time in which the engine computed, as of the last load report."""

    def __init__(
        self,
        prefill: PrefillScheduler,
        decode: DecodeScheduler,
        activity: ActivityLog,
        cost: CorrectedCost,
        now: float,
    ) -> None:
        self.activity, self.cost = activity, cost
        self.own, self.prefill, self.decode = prefill.own, prefill, decode
        self.hand_overs = decode.hand_overs
        self.role, self.flip = self.own.instance.role, 0
        self.busy = 0.0
        self.step_times = StepTimes(self.own, decode.batch, cost)
        self._step_s, self._since = 0.0, now  # as of the last load report
        self._unlisted = 0  # heartbeats since the last list
        # By the cost table, without its corrections:
        table, capacity = cost.table, self.own.capacity
        self._kv_tokens, self._base_s = capacity.tokens, table.decode_s(1, 0)
        self._chunk_s = table.chunk_s((Span("", 0, table.chunk_tokens or capacity.chunk_tokens),))

    def load(self) -> Load:
        """The current load. The KV blocks of a blocked prompt count as free: it gives them back for a decode request
        that needs them."""
        prefill, decode, hand_overs, cost = self.prefill, self.decode, self.hand_overs, self.cost
        queue, batch, forecast = prefill.queue, decode.batch, decode.forecast
        step_s, tpot_s = forecast.step_s(), _middle(decode.tpot_limits())
        return Load(
            free_blocks=self._free_blocks(),
            queued=len(queue),
            queued_tokens=queue.tokens,
            queued_s=max(queue.seconds, 0.0) * cost.prefill,
            waiting=decode.waiting(),
            landed=len(batch.landed),
            running=len(batch.running),
            heavy=forecast.heavy,
            growth_blocks=forecast.growth,
            kept_blocks=hand_overs.kept_blocks(),
            deferred_blocks=hand_overs.deferred.blocks,
            decode_s=forecast.decode_s(),
            busy=self.busy,
            stalled=prefill.dispatcher.stalled(),
            unread=hand_overs.kv_receive.failing,
            kv_tokens=self._kv_tokens,
            context=forecast.context,
            step_s=step_s,
            share=max(1.0 - step_s / tpot_s, 0.0) if tpot_s else 1.0,
            base_s=self._base_s * cost.decode,
            chunk_s=self._chunk_s * cost.prefill,
            arrived=prefill.arrived,
            arrived_s=prefill.arrived_s,
            decodes=prefill.decodes,
            ended=forecast.ended,
            ended_tokens=forecast.ended_tokens,
            ttft_s=prefill.ttft_s,
            tpot_s=tpot_s,
        )

    def decode_load(self) -> Load:
        """What a decode route reads of the load of this instance, for its own prompts. The dispatcher calls this, so it
        asks the dispatcher nothing."""
        decode, forecast = self.decode, self.decode.forecast
        return Load(
            free_blocks=self._free_blocks(),
            waiting=decode.waiting(),
            running=len(decode.batch.running),
            heavy=forecast.heavy,
            growth_blocks=forecast.growth,
            kept_blocks=self.hand_overs.kept_blocks(),
            deferred_blocks=self.hand_overs.deferred.blocks,
            step_s=forecast.step_s(),
        )

    def _free_blocks(self) -> int:
        blocked = self.prefill.queue.blocked()
        return self.hand_overs.ledger.free + (0 if blocked is None else blocked.flow.blocks)

    def report(self, now: float) -> Publish:
        """The load report for the monitor. `busy` covers the time since the last report."""
        if now > self._since:
            step_s = self.activity.step_s
            self.busy = min((step_s - self._step_s) / (now - self._since), 1.0)
            self._step_s, self._since = step_s, now
        own = self.own
        return Publish(LoadReport(iid=own.iid, incarnation=own.incarnation, role=self.role, load=self.load()))

    def ready(self) -> Send:
        """The registration with the broker."""
        table = _table(self.own.cost) if self.own.compares_steps else None
        return Send(BROKER, Ready(instance=self.own.instance.in_role(self.role), load=self.load(), cost=table))

    def heartbeat(self) -> Send:
        """The heartbeat for the broker: role, load, requests held, messages read, KV counters, predictor status,
        step ratios, activity, and the events since the last one."""
        estimator, readers = self.decode.estimator, self.prefill.dispatcher.readers
        epoch, read = self.hand_overs.peers.read
        return self.own.report(
            Heartbeat,
            role=self.role,
            load=self.load(),
            holds=self._holds(),
            epoch=epoch,
            read=read,
            flip=self.flip,
            counters={**self.hand_overs.kv_receive.counters, **readers.counters},
            slots_used=self.prefill.slots_used,
            predictor=None if estimator is None else estimator.status(),
            unread_by={iid: each.why for iid, each in readers.breaker.failing.items()},
            step_ratio=self.step_times.report(),
            at=self.activity.now,
            activity=self.activity.report(),
            traced=self.activity.traced(),
        )

    def _holds(self) -> list[Hold] | None:
        """All requests held, or None to leave them out this time. A worker with a long queue lists it less often:
        otherwise the lists would cost more a request, the more requests wait."""
        self._unlisted += 1
        if len(self.prefill.choices) + len(self.decode.requests) > LISTED * self._unlisted:
            return None
        self._unlisted = 0
        return [*self.prefill.holds(), *self.decode.holds()]
