"""The decode half of a worker: offer -> reserve -> chunks land -> wait -> admit -> tokens, step by step.

A seat is kept, with its tokens, until the broker closes it: until then the broker can ask for them again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tetri.core.actions import BROKER, Action, AddRequest, AdmitRequest, Adopted, Broken, CancelRequest, Send
from tetri.core.decode.batch import Batch
from tetri.core.decode.kv_receive import KVReceive
from tetri.core.decode.load_forecast import LoadForecast
from tetri.core.decode.request import DecodeRequest, KVInflow, obstacle
from tetri.core.decode.starvation_guard import StarvationGuard
from tetri.core.instance.identity import Identity
from tetri.core.instance.ledger import Ledger
from tetri.core.length.estimator import LengthEstimator
from tetri.engine_request import EngineRequest, HiddenStateEstimate, Sampled, Span
from tetri.request import LengthRange, Stage
from tetri.wire.handover import Chunk, Drop, Grant, Landed, LengthUpdate, Offer, Refuse
from tetri.wire.messages import End, Hold, Resend, Staged, TokenItem, Tokens

Answer = Grant | Refuse | Landed


class DecodeScheduler:
    """`requests` by key, at most one per request. `moving`: those whose KV has not all landed. `bare`: those for which
    the engine has no blocks yet. `free_memory` is asked when a request, by its id, finds too few blocks: what the other
    half does to give it so many, nothing if it cannot. `way` says over which path KV comes from an instance, by its
    id and incarnation, and out of which segment. `estimator` is that of the worker, where lengths are learned."""

    def __init__(
        self,
        own: Identity,
        ledger: Ledger,
        free_memory: Callable[[str, int], list[Action]],
        way: Callable[[str, int], tuple[str, str] | None],
        estimator: LengthEstimator | None = None,
    ) -> None:
        self.estimator = estimator
        self.own, self.ledger, self.free_memory, self.way = own, ledger, free_memory, way
        self.kv_receive = KVReceive()
        self.starvation_guard = StarvationGuard(
            3 * max(own.load_s, own.heartbeat_s)
        )  # with every view and every beat they ask again
        self.forecast = LoadForecast(own, estimator)
        self.batch = Batch(own, ledger, self.forecast)
        self.requests: dict[str, DecodeRequest] = {}
        self.moving: dict[str, DecodeRequest] = {}
        self.bare: dict[str, DecodeRequest] = {}
        self._keys: dict[str, str] = {}  # rid -> key

    # ------------------------------------------------------------ the hand-over

    def offer(self, message: Offer, now: float) -> list[Action]:
        request = self._request_of(message.rid)
        if request is not None and request.offer.attempt > message.attempt:
            return [self._answer(Refuse, message, why="a later attempt is here")]
        if request is not None and (request.is_for(message) or request.has_all_of(message)):
            if message.length is not None and message.length != request.offer.length:
                self._correct(request, message.length)  # a LengthUpdate may have been lost
            request.offer = request.offer if request.is_for(message) else message  # the same under another number
            return [self._answer(Grant, message)]
        actions = self._release(request) if request else []
        why = obstacle(message, self.own.instance.fingerprint, self.own.capacity)
        way = self.way(message.src, message.incarnation)
        if why is None and way is None:
            why = f"{self.own.iid} does not know this start of {message.src} yet, or no path to its KV"
        key = f"d:{message.rid}:{message.attempt}:{message.src}:{message.offer}"
        if key in self.kv_receive.fetching:
            why = "KV that it brought before is still on its way"
        if why is not None or way is None:
            return [*actions, self._answer(Refuse, message, why=why)]
        kept = self.batch.kept_free()
        why = self.starvation_guard.before(message.rid, message.blocks, self.ledger, kept, now)
        if why is None:
            if self.ledger.free < message.blocks + kept and not self.ledger.crowded(message.blocks):
                actions += self.free_memory(message.rid, message.blocks + kept)
            why = self.ledger.reserve(key, message.blocks, kept)
        if why is not None:
            self.starvation_guard.enter(message.rid, message.blocks, now)
            return [*actions, self._answer(Refuse, message, why=why)]
        self.starvation_guard.leave(message.rid)
        request = DecodeRequest(key, message, KVInflow(message.blocks, *way), message.length, blocks=message.blocks)
        self.requests[key] = self.moving[key] = self.bare[key] = request
        self._keys[message.rid] = key
        self.forecast.enter(request)
        tokens = (*message.prompt, *message.output)
        engine_request = EngineRequest(key, "decode", tokens, len(message.prompt), message.sampling)
        return [*actions, AddRequest(engine_request), self._answer(Grant, message)]

    def chunk(self, message: Chunk) -> list[Action]:
        request = self._request_of(message.rid)
        if request is None or not request.is_for(message):
            self.kv_receive.stray(message, request)
            return [self._answer(Refuse, message, why="no such offer here")]
        if self.kv_receive.again(message, request):
            here = request.landed_as or message.index in request.flow.landed
            return [self._answer(Landed, message, index=message.index)] if here else []
        why = self.kv_receive.announced(message, request)
        if why is not None:
            return [self._answer(Refuse, message, why=why), *self._release(request)]
        return [self.kv_receive.fetch(message, request)] if request.allocated and request.flow.broken is None else []

    def adopted(self, event: Adopted, now: float) -> list[Action]:
        request = self.requests.get(event.key)
        again = self.kv_receive.adopted(event, request, now)
        if request is None:
            return []
        flow = request.flow
        if flow.broken is not None:  # the engine must know the leg until the last copy is made
            refuse = self._answer(Refuse, request.offer, why=flow.broken, corrupt=flow.corrupt)
            return [] if request.key in self.kv_receive.fetching else [refuse, *self._release(request)]
        if event.index not in flow.landed:
            return [*again]
        actions: list[Action] = [self._answer(Landed, request.offer, index=event.index)]
        if flow.complete:
            assert flow.token is not None
            del self.moving[request.key]
            self.batch.land(request, flow.token)
            actions.append(self._stage(request, Stage.WAITING))
        return actions

    def fetch_again(self, now: float) -> list[Action]:
        """Chunks that were lost, some time ago."""
        places = [(self.requests[key], index) for key, index in self.kv_receive.due(now)]
        return [self.kv_receive.fetch(request.flow.announced[index], request) for request, index in places]

    def drop(self, message: Drop) -> list[Action]:
        request = self._request_of(message.rid)
        return (
            self._release(request) if request is not None and request.is_for(message) and not request.landed_as else []
        )

    def reject(self, key: str, why: str) -> list[Action]:
        """The engine cannot run this leg."""
        request = self.requests[key]
        return [self._answer(Refuse, request.offer, why=why), *self._release(request, in_engine=False)]

    def orphaned(self, src: str) -> list[Action]:
        """A prefill instance is gone: what it had not sent completely never comes."""
        return [
            action
            for request in [*self.moving.values()]
            if request.offer.src == src
            for action in self._release(request)
        ]

    def repeat(self, src: str) -> list[Action]:
        """The connection to a prefill instance stands (again): repeat what it may have missed."""
        actions: list[Action] = []
        for request in [request for request in self.requests.values() if request.offer.src == src and not request.end]:
            actions.append(self._answer(Grant, request.offer))
            actions += [self._answer(Landed, request.offer, index=index) for index in request.flow.landed]
        return actions

    def resend_grants(self) -> list[Action]:
        """Tell of the grants whose KV is not all there: a prefill instance that took its offer back, while it
        could not say so, says so now."""
        return [self._answer(Grant, request.offer) for request in self.moving.values()]

    def close(self, rid: str, attempt: int) -> list[Action]:
        self.starvation_guard.leave(rid)
        request = self._request_of(rid)
        return self._release(request) if request is not None and request.offer.attempt <= attempt else []

    def _release(self, request: DecodeRequest, *, in_engine: bool = True) -> list[Action]:
        del self.requests[request.key], self._keys[request.offer.rid]
        if request.end is not None:
            return []
        self._leave(request)
        return [CancelRequest(request.key)] if in_engine else []

    def _leave(self, request: DecodeRequest) -> None:
        """It takes nothing here any more."""
        self.kv_receive.forget(request)
        self.moving.pop(request.key, None)
        self.bare.pop(request.key, None)
        self.batch.leave(request)
        self.forecast.leave(request)
        self.ledger.close(request.key)

    # ------------------------------------------------------------ predicted lengths

    def update_length(self, message: LengthUpdate) -> list[Action]:
        """The prefill side knows more of its length than when it was offered."""
        request = self._request_of(message.rid)
        if request is not None and request.is_for(message):
            self._correct(request, message.length)
        return []

    def _correct(self, request: DecodeRequest, length: LengthRange) -> None:
        if request.end is None and not request.estimates:
            self.batch.update_length(request, length)

    def estimates(self, estimate: HiddenStateEstimate) -> None:
        """Its own hidden state says how much follows; of no use when it has just ended, or its length is fixed."""
        request = self.batch.running.get(estimate.key)
        assert self.estimator is not None
        if request is not None and not request.offer.sampling.ignore_eos:
            request.estimates = True
            self.batch.update_length(
                request, self.estimator.estimates(request.offer.rid, estimate, request.offer.sampling)
            )

    # ------------------------------------------------------------ running

    def admit(self, most: int) -> list[Action]:
        """Let landed seats into a batch of up to `most`."""
        actions: list[Action] = []
        for request in self.batch.admit(most):
            actions += [AdmitRequest(request.key, request.tokens[0]), self._stage(request, Stage.DECODE)]
        return actions

    def steps(self) -> bool:
        """Whether the engine has something to do: a token to compute, or blocks to allocate."""
        return bool(self.batch.running or self.bare)

    def stuck(self) -> bool:
        """Whether nothing runs until another seat is admitted."""
        return self.batch.stuck() and bool(self.batch.landed)

    def step_done(
        self,
        spans: Sequence[Span],
        tokens: Sequence[Sampled],
        allocated: Sequence[str],
        preempted: Sequence[str],
        steps: int,
    ) -> list[Action]:
        actions: list[Action] = []
        for key in allocated:
            request = self.bare.pop(key)
            request.allocated = True
            actions += [self.kv_receive.fetch(chunk, request) for chunk in request.flow.announced.values()]
        items, ended = self.batch.step_done(spans, tokens, preempted, steps)
        for request, end in ended:
            self._finish(request, end)
        return [self._report(Tokens, items=items), *actions] if items else actions

    def _finish(self, request: DecodeRequest, end: End) -> None:
        self._leave(request)
        if self.estimator is not None and not request.offer.sampling.ignore_eos:
            self.estimator.ended(request.offer.rid, request.written, end.reason)
        request.end = end

    # ------------------------------------------------------------ what it says of itself

    def resend(self, message: Resend) -> list[Action]:
        """All that is known, also what would be told later."""
        request = self._request_of(message.rid)
        if request is None or request.offer.attempt != message.attempt:
            return []
        ids = request.outputs()[message.start :]
        item = TokenItem(request.offer.rid, request.offer.attempt, message.start, ids, request.end)
        if request.running:
            self.batch.mark_sent(request)
        return [self._report(Tokens, items=[item])] if ids or request.end else []

    def holds(self) -> list[Hold]:
        """`outputs` are those that the broker was told of: it asks for what it then lacks, and for no more."""
        return [
            Hold(request.offer.rid, request.offer.attempt, request.stage, len(request.offer.output) + request.sent)
            for request in self.requests.values()
        ]

    def waiting(self) -> int:
        return len(self.moving) + len(self.batch.landed)

    def _request_of(self, rid: str) -> DecodeRequest | None:
        return self.requests[self._keys[rid]] if rid in self._keys else None

    def _stage(self, request: DecodeRequest, stage: Stage) -> Send:
        return self._report(
            Staged, rid=request.offer.rid, attempt=request.offer.attempt, stage=stage, peer=request.offer.src
        )

    def _report(self, kind: type[Staged] | type[Tokens], **fields: Any) -> Send:
        return Send(BROKER, kind(iid=self.own.iid, incarnation=self.own.incarnation, **fields))

    def _answer(self, kind: type[Answer], to: Offer | Chunk, **fields: Any) -> Send:
        who: dict[str, Any] = {"src": self.own.iid, "incarnation": self.own.incarnation}
        return Send(to.src, kind(**who, rid=to.rid, attempt=to.attempt, offer=to.offer, **fields))

    def check(self) -> None:
        """Count everything again."""
        if {request.offer.rid: key for key, request in self.requests.items()} != self._keys:
            raise Broken(f"seats and their index differ: {self._keys}")
        here = [request for request in self.requests.values() if request.end is None]
        for request in here:
            if request.key not in self.ledger:
                raise Broken(f"{request.key} has no account")
            places = [place for place in (self.moving, self.batch.landed, self.batch.running) if request.key in place]
            right = self.batch.running if request.running else self.batch.landed if request.landed_as else self.moving
            if places != [right] or (request.key in self.bare) == request.allocated:
                raise Broken(f"{request.key} is not where a seat in {request.stage} is")
        if len(here) != len(self.moving) + len(self.batch.landed) + len(self.batch.running):
            raise Broken("seats that are no more are still counted")
        self.kv_receive.check(self.moving.values())
        self.batch.check()
        self.forecast.check(here)
