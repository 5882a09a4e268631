"""Lone steps: a request that may have killed workers is computed while nothing else is (core/broker/suspects.py).

A lone step is announced to the broker, and so is its end. After both, the engine computes nothing until the broker has
answered: what the broker knows of lone steps is then always true, whatever the worker dies of. That costs two round
trips a lone step."""

from __future__ import annotations

from tetri.core.actions import Action
from tetri.core.decode.request import DecodeRequest
from tetri.core.decode.scheduler import DecodeScheduler
from tetri.core.prefill.request import PrefillRequest
from tetri.core.prefill.scheduler import PrefillScheduler
from tetri.request import Stage
from tetri.wire.messages import LoneStep, Proceed

Lone = PrefillRequest | DecodeRequest


class LoneSteps:
    """Announces lone steps one at a time, and holds all other requests meanwhile.

    waits     the broker has not answered the last announcement yet: the engine must not compute
    next      the request of the announced step, until that step begins
    running   the request of the step under way, if that is a lone step
    yields    a prompt gives the planned step to the batch, which has outgrown the memory
    """

    def __init__(self, prefill: PrefillScheduler, decode: DecodeScheduler) -> None:
        self.own, self.prefill, self.decode = prefill.own, prefill, decode
        self.waits = False
        self.running: Lone | None = None
        self.next: Lone | None = None
        self.yields = False
        self._announced: list[Action] = []  # the last announcement
        self._number = 0

    def gives_way(self, request: Lone) -> bool:
        """Return whether the batch goes on first, as long as it can, because it holds more memory than there is. A
        prompt may find none then: alone it would wait for ever."""
        batch, short = self.decode.batch, self.decode.batch.ledger.free < 0
        self.yields = isinstance(request, PrefillRequest) and short and bool(batch.running) and not batch.stuck()
        if self.yields:
            self.prefill.plan_alone(None)
        return self.yields

    def announce(self, request: Lone) -> list[Action]:
        """Announce that the next step computes this request alone, and plan nothing else."""
        self.next = request
        self.prefill.plan_alone(None)
        return self._announce(request, over=False)

    def _announce(self, request: Lone, *, over: bool) -> list[Action]:
        self._number, self.waits = self._number + 1, True
        of = request.offer if isinstance(request, DecodeRequest) else request.lead
        stage = Stage.PREFILL if isinstance(request, PrefillRequest) else Stage.WAITING
        number, rid, attempt = self._number, of.rid, of.attempt
        self._announced = [
            self.own.report(LoneStep, rid=rid, attempt=attempt, number=number, stage=stage, over=over)
        ]
        return self._announced

    def repeat(self) -> list[Action]:
        """Return the announcement that the broker has not answered, if any: it or the answer may be lost."""
        return self._announced if self.waits else []

    def proceed(self, message: Proceed) -> list[Action]:
        """Note that the broker has answered the announcement of this number."""
        self.waits = self.waits and message.number != self._number
        return []

    def begin(self) -> list[Action]:
        """Prepare the announced step, and set `running`, once the broker has answered. If the step cannot run any more,
        announce its end instead; if the request is gone, the announcement does not matter."""
        request = self.next
        if request is not None and not self._is_here(request):
            self.next, self.waits = None, False
            return []
        if request is None or self.waits:
            return []
        self.next = None
        prefill = request if isinstance(request, PrefillRequest) else None
        self.prefill.plan_alone(prefill)
        if prefill is not None and not self.prefill.expected:  # slots are short
            return self._announce(request, over=True)
        self.running = request
        admitted = self.decode.admit_lone() if prefill is None else []
        return [*admitted, *self.prefill.holding(), *self.decode.batch.hold_all_but(request.key)]

    def _is_here(self, request: Lone) -> bool:
        if isinstance(request, DecodeRequest):
            return self.decode.batch.lone is request
        return self.prefill.queue.started.get(request.key) is request

    def ended(self) -> list[Action]:
        """Let the others go on after a lone step, and announce its end."""
        request, self.running = self.running, None
        assert request is not None
        return [*self.decode.batch.release_all(), *self._announce(request, over=True)]
