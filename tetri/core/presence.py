"""What a worker says of itself: its registration, its beats, its load."""

from __future__ import annotations

from tetri.core.actions import BROKER, Publish, Send
from tetri.core.decode import Decode
from tetri.core.foresight import Foresight
from tetri.core.ledger import Ledger
from tetri.core.peers import Identity
from tetri.core.prefill import Prefill
from tetri.wire.messages import Beat, Load, LoadReport, Ready


class Presence:
    """`role` tells others which new work to send, `flip` is the number of the Flip that it came with. `busy`: the share
    of the time in which the engine computed, as last reported."""

    def __init__(
        self,
        own: Identity,
        ledger: Ledger,
        prefill: Prefill,
        decode: Decode,
        foresight: Foresight | None,
        now: float,
    ) -> None:
        self.own, self.role, self.flip = own, own.instance.role, 0
        self.ledger, self.prefill, self.decode, self.foresight = ledger, prefill, decode, foresight
        self.busy = 0.0
        self._busy_s, self._since = 0.0, now

    def worked(self, seconds: float) -> None:
        """The engine computed for so long."""
        self._busy_s += seconds

    def load(self) -> Load:
        """Blocks that a blocked prompt would give back to a request to be decoded count as free."""
        queue, outlook, blocked = self.prefill.queue, self.decode.outlook, self.prefill.blocked()
        return Load(
            free_blocks=self.ledger.free + (0 if blocked is None else blocked.flow.blocks),
            queued=len(queue),
            queued_tokens=queue.tokens,
            queued_s=max(queue.seconds, 0.0),
            waiting=self.decode.waiting(),
            landed=len(self.decode.batch.landed),
            running=len(self.decode.batch.running),
            heavy=outlook.heavy,
            growth_blocks=outlook.growth,
            decode_s=outlook.decode_s(),
            busy=self.busy,
            stalled=self.prefill.dispatcher.stalled(),
        )

    def report(self, now: float) -> Publish:
        """For the monitor. The time since the last report counts for `busy`."""
        if now > self._since:
            self.busy = min(self._busy_s / (now - self._since), 1.0)
            self._busy_s, self._since = 0.0, now
        own = self.own
        return Publish(LoadReport(iid=own.iid, incarnation=own.incarnation, role=self.role, load=self.load()))

    def ready(self) -> Send:
        return Send(BROKER, Ready(instance=self.own.instance.in_role(self.role), load=self.load()))

    def beat(self) -> Send:
        own, holds = self.own, [*self.prefill.holds(), *self.decode.holds()]
        beat = Beat(
            iid=own.iid,
            incarnation=own.incarnation,
            role=self.role,
            load=self.load(),
            holds=holds,
            flip=self.flip,
            counters=dict(self.decode.landing.counters),
            slots_taken=self.prefill.slots_taken,
            predictor=None if self.foresight is None else self.foresight.status(),
        )
        return Send(BROKER, beat)
