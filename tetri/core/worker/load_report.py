"""What a worker reports about itself: registration and heartbeat to the broker, load report to the monitor."""

from __future__ import annotations

from tetri.core.actions import BROKER, Publish, Send
from tetri.core.decode.scheduler import DecodeScheduler
from tetri.core.prefill.scheduler import PrefillScheduler
from tetri.request import DECODE_ROLES
from tetri.wire.messages import Heartbeat, Hold, Load, LoadReport, Ready

LISTED = 1000  # most requests that a heartbeat lists, on average


class LoadReporter:
    """Makes a worker's reports. `role` decides which new work others send; `flip` is the number of the Flip that set
    it, 0 before the first. `busy`: the share of time in which the engine computed, as of the last load report."""

    def __init__(self, prefill: PrefillScheduler, decode: DecodeScheduler, now: float) -> None:
        self.own, self.prefill, self.decode = prefill.own, prefill, decode
        self.role, self.flip = self.own.instance.role, 0
        self.busy = 0.0
        self._busy_s, self._since = 0.0, now
        self._unlisted = 0  # heartbeats since the last list

    def worked(self, seconds: float) -> None:
        """Add time in which the engine computed."""
        self._busy_s += seconds

    def load(self) -> Load:
        """The current load. The KV blocks of a blocked prompt count as free: it gives them back for a decode request
        that needs them."""
        queue, decode, forecast = self.prefill.queue, self.decode, self.decode.forecast
        return Load(
            free_blocks=self._free_blocks(),
            queued=len(queue),
            queued_tokens=queue.tokens,
            queued_s=max(queue.seconds, 0.0),
            waiting=decode.waiting(),
            landed=len(decode.batch.landed),
            running=len(decode.batch.running),
            heavy=forecast.heavy,
            growth_blocks=forecast.growth,
            kept_blocks=decode.kept_blocks(),
            deferred_blocks=decode.deferred.blocks,
            decode_s=forecast.decode_s(),
            busy=self.busy,
            stalled=self.prefill.dispatcher.stalled(),
            unread=decode.kv_receive.failing,
        )

    def home(self) -> Load | None:
        """What a decode route reads of the load of this instance, for its own prompts; None if its role takes no
        decodes. The dispatcher calls this, so it asks the dispatcher nothing."""
        decode, forecast = self.decode, self.decode.forecast
        if self.role not in DECODE_ROLES:
            return None
        return Load(
            free_blocks=self._free_blocks(),
            waiting=decode.waiting(),
            running=len(decode.batch.running),
            heavy=forecast.heavy,
            growth_blocks=forecast.growth,
            kept_blocks=decode.kept_blocks(),
            deferred_blocks=decode.deferred.blocks,
        )

    def _free_blocks(self) -> int:
        blocked = self.prefill.queue.blocked()
        return self.decode.ledger.free + (0 if blocked is None else blocked.flow.blocks)

    def report(self, now: float) -> Publish:
        """The load report for the monitor. `busy` covers the time since the last report."""
        if now > self._since:
            self.busy = min(self._busy_s / (now - self._since), 1.0)
            self._busy_s, self._since = 0.0, now
        own = self.own
        return Publish(LoadReport(iid=own.iid, incarnation=own.incarnation, role=self.role, load=self.load()))

    def ready(self) -> Send:
        """The registration with the broker."""
        return Send(BROKER, Ready(instance=self.own.instance.in_role(self.role), load=self.load()))

    def heartbeat(self) -> Send:
        """The heartbeat for the broker: role, load, requests held, messages read, KV counters, predictor status."""
        estimator, readers = self.decode.estimator, self.prefill.dispatcher.readers
        epoch, read = self.decode.peers.read
        return self.own.report(
            Heartbeat,
            role=self.role,
            load=self.load(),
            holds=self._holds(),
            epoch=epoch,
            read=read,
            flip=self.flip,
            counters={**self.decode.kv_receive.counters, **readers.counters},
            slots_used=self.prefill.slots_used,
            predictor=None if estimator is None else estimator.status(),
            unread_by={iid: each.why for iid, each in readers.breaker.failing.items()},
        )

    def _holds(self) -> list[Hold] | None:
        """All requests held, or None to leave them out this time. A worker with a long queue lists it less often:
        otherwise the lists would cost more a request, the more requests wait."""
        self._unlisted += 1
        if len(self.prefill.requests) + len(self.decode.requests) > LISTED * self._unlisted:
            return None
        self._unlisted = 0
        return [*self.prefill.holds(), *self.decode.holds()]
