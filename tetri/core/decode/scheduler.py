"""The decode scheduler of a worker: offer -> reserve memory, now or later -> chunks land -> wait -> admit -> tokens.

It keeps a request, with its tokens, until the broker closes it: until then the broker can ask for them again.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

from tetri.core.actions import Action, AddRequest, AdmitRequest, Adopted, Broken, CancelRequest, Send
from tetri.core.decode.batch import Batch
from tetri.core.decode.deferred import DeferredOffers
from tetri.core.decode.kv_receive import KVReceive
from tetri.core.decode.load_forecast import LoadForecast
from tetri.core.decode.request import DecodeRequest, KVInflow, obstacle
from tetri.core.instance.identity import Identity
from tetri.core.instance.ledger import Ledger
from tetri.core.instance.peers import Peers
from tetri.core.length.estimator import LengthEstimator
from tetri.engine_request import EngineRequest, HiddenStateEstimate, StepDone
from tetri.request import LengthRange, Stage, token_ids
from tetri.wire.handover import Chunk, Defer, Drop, Grant, Landed, LengthUpdate, Offer, Refuse
from tetri.wire.messages import End, Hold, Resend, Staged, TokenItem, Tokens

Answer = Grant | Defer | Refuse | Landed
FreeMemory = Callable[[str, int], list[Action]]


class DecodeScheduler:
    """Schedules the decode phase.

    deferred      offers for which there is no memory yet
    requests      all that were granted and the broker has not closed, by key; at most one attempt of each request
    moving        those whose KV has not all landed
    unallocated   those for which the engine has no blocks yet

    `estimator` is the worker's, None unless lengths are "trained"."""

    def __init__(self, own: Identity, ledger: Ledger, peers: Peers, estimator: LengthEstimator | None) -> None:
        self.own, self.ledger, self.peers, self.estimator = own, ledger, peers, estimator
        self.kv_receive = KVReceive()
        self.deferred = DeferredOffers(own.capacity.blocks, 3 * own.renew_s)
        self.forecast = LoadForecast(own, estimator)
        self.batch = Batch(own, ledger, self.forecast)
        self.requests: dict[str, DecodeRequest] = {}
        self.moving: dict[str, DecodeRequest] = {}
        self.unallocated: dict[str, DecodeRequest] = {}
        self._keys: dict[str, str] = {}  # rid -> key

    # ------------------------------------------------------------ the hand-over

    def offer(self, message: Offer, now: float, free_memory: FreeMemory | None) -> list[Action]:
        """Reserve memory for a request and grant it. Defer it until there is memory, or refuse it if it can never be
        served here. A later offer replaces an earlier one of the request; an earlier one that comes late, or again,
        changes nothing. `free_memory`: see `grant_deferred`."""
        request, deferred = self._request_of(message.rid), self.deferred.get(message.rid)
        old = request or deferred
        if old is not None and old.offer.attempt > message.attempt:
            return [self._answer(Refuse, message, why="a later attempt is here")]
        if old is not None and old.follows(message):
            return [self._answer(Refuse, message, why="a later offer is here")]
        if request is not None and (request.is_for(message) or request.has_all_of(message)):
            return self._offered_again(request, message)
        if deferred is not None and deferred.is_for(message):
            if message.length is not None and message.length != deferred.length:
                self.forecast.update_length(deferred, message.length)
            self.deferred.asked(deferred, now)
            return [self._answer(Defer, message)]
        actions = self._give_back(old) if old else []
        fresh, why = self._incoming(message)
        if fresh is not None and self.deferred.enter(fresh, now, self.ledger.grantable(self.batch.kept_free())):
            self.forecast.enter(fresh)
        elif fresh is not None:
            why = f"offers of {self.deferred.blocks} blocks are deferred, that is enough"
        if why is not None:
            return [*actions, self._answer(Refuse, message, why=why)]
        actions += self.grant_deferred(now, free_memory)
        return [*actions, self._answer(Defer, message)] if message.rid in self.deferred else actions

    def _offered_again(self, request: DecodeRequest, message: Offer) -> list[Action]:
        if message.length is not None and message.length != request.offer.length:
            self._correct(request, message.length)  # a LengthUpdate may have been lost
        if not request.is_for(message):
            request.offer = message  # the same KV under another offer number
        return [self._answer(Grant, message)]

    def _incoming(self, message: Offer) -> tuple[DecodeRequest | None, str | None]:
        """Return the request of a new offer, or why it cannot be served here whatever memory becomes free."""
        why = obstacle(message, self.own.instance.fingerprint, self.own.capacity)
        if why is not None:
            return None, why
        way = self.peers.way(message.src, message.incarnation)
        if way is None:
            return None, f"{self.own.iid} does not know this incarnation of {message.src} yet, or has no path to its KV"
        key = f"d:{message.rid}:{message.attempt}:{message.src}:{message.offer}"
        if key in self.kv_receive.fetching:
            return None, "KV that it brought before is still on its way"
        flow, alone, blocks = KVInflow(message.blocks, *way), message.alone, message.blocks
        return DecodeRequest(key, message, flow, message.length, alone=alone, blocks=blocks), None

    def grant_deferred(self, now: float, free_memory: FreeMemory | None) -> list[Action]:
        """Grant the deferred offers for which there is memory now.

        `free_memory(rid, blocks)` returns the actions by which the prefill phase frees memory for a request; empty if
        it cannot free enough. None while the engine computes: no prompt can give up its memory then."""
        actions: list[Action] = []
        if not self.deferred.blocks:
            return actions
        kept = self.batch.kept_free()
        if free_memory is None and not self.ledger.grantable(kept):
            return actions
        for request in self.deferred.first(now):
            short = self.ledger.free < request.blocks + kept and not self.ledger.crowded(request.blocks)
            if short and free_memory is not None:
                actions += free_memory(request.offer.rid, request.blocks + kept)
            if self.ledger.reserve(request.key, request.blocks, kept):
                actions += self._grant(request)
        return actions

    def kept_blocks(self) -> int:
        """Return how many of the free blocks no offer gets now."""
        return max(self.ledger.free, 0) - self.ledger.grantable(self.batch.kept_free())

    def _grant(self, request: DecodeRequest) -> list[Action]:
        offer, key = request.offer, request.key
        self.deferred.leave(offer.rid)
        self.requests[key] = self.moving[key] = self.unallocated[key] = request
        self._keys[offer.rid] = key
        tokens = (*offer.prompt, *offer.output)
        engine_request = EngineRequest(key, "decode", tokens, len(offer.prompt), offer.sampling)
        return [AddRequest(engine_request), self._answer(Grant, offer)]

    def expire(self, now: float) -> list[Action]:
        """Refuse the deferred offers that their prefill instances have not repeated for long. Those that still want
        one offer it again."""
        expired = self.deferred.expired(now)
        for request in expired:
            self._give_back(request)
        return [self._answer(Refuse, request.offer, why="the offer was not repeated") for request in expired]

    def chunk(self, message: Chunk) -> list[Action]:
        """Fetch an announced chunk, once the engine has the request's blocks."""
        request = self._request_of(message.rid) or self.deferred.get(message.rid)
        if request is None or not request.is_for(message):
            self.kv_receive.stray(message, request)
            return [self._answer(Refuse, message, why="no such offer here")]
        if self.kv_receive.is_duplicate(message, request):
            here = request.landed_as or message.index in request.flow.landed
            return [self._answer(Landed, message, index=message.index)] if here else []
        why = self.kv_receive.announced(message, request)
        if why is not None:
            return [self._answer(Refuse, message, why=why), *self._give_back(request)]
        return [self.kv_receive.fetch(message, request)] if request.allocated and request.flow.broken is None else []

    def adopted(self, event: Adopted, now: float) -> list[Action]:
        """Handle the result of a fetch. When all KV has landed, the request waits for admission."""
        request = self.requests.get(event.key)
        retries = self.kv_receive.adopted(event, request, now)
        if request is None:
            return []
        flow = request.flow
        if flow.broken is not None:  # the engine must keep its blocks until no fetch is pending
            refuse = self._answer(Refuse, request.offer, why=flow.broken, corrupt=flow.corrupt, unread=True)
            return [] if request.key in self.kv_receive.fetching else [refuse, *self._release(request)]
        if event.index not in flow.landed:
            return [*retries]
        actions: list[Action] = [self._answer(Landed, request.offer, index=event.index)]
        if flow.complete:
            assert flow.token is not None
            del self.moving[request.key]
            self.batch.land(request, flow.token)
            actions.append(self._stage(request, Stage.WAITING))
        return actions

    def fetch_again(self, now: float) -> list[Action]:
        """Fetch lost chunks again after their pause."""
        places = [(self.requests[key], index) for key, index in self.kv_receive.due(now)]
        return [self.kv_receive.fetch(request.flow.announced[index], request) for request, index in places]

    def drop(self, message: Drop) -> list[Action]:
        """Release a request whose offer is withdrawn, unless all its KV has landed."""
        request = self._request_of(message.rid) or self.deferred.get(message.rid)
        if request is None or request.landed_as or not request.is_for(message):
            return []
        return self._give_back(request)

    def reject(self, key: str, why: str) -> list[Action]:
        """Refuse a request that the engine can never run."""
        request = self.requests[key]
        return [self._answer(Refuse, request.offer, why=why), *self._release(request, in_engine=False)]

    def orphaned(self, src: str) -> list[Action]:
        """Release the requests whose KV was still moving from a prefill instance that has disappeared."""
        self.kv_receive.unread.pop(src, None)
        orphans = [each for each in (*self.moving.values(), *self.deferred) if each.offer.src == src]
        return [action for request in orphans for action in self._give_back(request)]

    def repeat(self, src: str) -> list[Action]:
        """Send again what a prefill instance may have missed before its connection was (re)established."""
        actions: list[Action] = []
        for request in [request for request in self.requests.values() if request.offer.src == src and not request.end]:
            actions.append(self._answer(Grant, request.offer))
            actions += [self._answer(Landed, request.offer, index=index) for index in request.flow.landed]
        return actions

    def resend_answers(self) -> list[Action]:
        """Send the grants of moving requests again, and the Defer of the offer that is next. A prefill instance that
        has withdrawn the offer, and whose Drop was lost, answers with another Drop."""
        answers: list[Action] = [self._answer(Grant, request.offer) for request in self.moving.values()]
        answers += [self._answer(Defer, request.offer) for request in islice(self.deferred, 1)]
        return answers

    def close(self, rid: str, attempt: int) -> list[Action]:
        """Forget a request up to this attempt, in any stage."""
        request = self._request_of(rid) or self.deferred.get(rid)
        return self._give_back(request) if request is not None and request.offer.attempt <= attempt else []

    def _give_back(self, request: DecodeRequest) -> list[Action]:
        """Release a request, granted or deferred."""
        if not self.deferred.leave(request.offer.rid):
            return self._release(request)
        self.forecast.leave(request)
        return []

    def _release(self, request: DecodeRequest, *, in_engine: bool = True) -> list[Action]:
        del self.requests[request.key], self._keys[request.offer.rid]
        if request.end is not None:
            return []
        self._leave(request)
        return [CancelRequest(request.key)] if in_engine else []

    def _leave(self, request: DecodeRequest) -> None:
        """Free everything that a request uses here."""
        self.kv_receive.forget(request)
        self.moving.pop(request.key, None)
        self.unallocated.pop(request.key, None)
        self.batch.leave(request)
        self.forecast.leave(request)
        self.ledger.close(request.key)

    # ------------------------------------------------------------ predicted lengths

    def update_length(self, message: LengthUpdate) -> list[Action]:
        """Set a better length range that the prefill instance has sent."""
        request, deferred = self._request_of(message.rid), self.deferred.get(message.rid)
        if request is not None and request.is_for(message):
            self._correct(request, message.length)
        elif deferred is not None and deferred.is_for(message):
            self.forecast.update_length(deferred, message.length)
        return []

    def _correct(self, request: DecodeRequest, length: LengthRange) -> None:
        if request.end is None and not request.estimated:
            self.batch.update_length(request, length)

    def estimates(self, estimate: HiddenStateEstimate) -> None:
        """Update the length range of a running request from its hidden state, unless its length is fixed."""
        request = self.batch.running.get(estimate.key)
        assert self.estimator is not None
        if request is not None and not request.offer.sampling.ignore_eos:
            request.estimated = True
            length = self.estimator.estimates(request.offer.rid, estimate, request.offer.sampling)
            self.batch.update_length(request, length)

    # ------------------------------------------------------------ running

    def admit(self, most: int) -> list[Action]:
        """Admit landed requests to the batch, up to `most` in all."""
        return [action for request in self.batch.admit(most) for action in self._admitted(request)]

    def admit_lone(self) -> list[Action]:
        """Admit the request that the next step computes alone, unless it is in the batch already."""
        return [action for request in self.batch.admit_lone() for action in self._admitted(request)]

    def _admitted(self, request: DecodeRequest) -> list[Action]:
        return [AdmitRequest(request.key, *token_ids(request.tokens[:1])), self._stage(request, Stage.DECODE)]

    def steps(self) -> bool:
        """Return whether the engine has a token to compute or blocks to allocate."""
        return bool(self.batch.running or self.unallocated)

    def stuck(self) -> bool:
        """Return whether no request can run, while a landed one could be admitted."""
        return self.batch.stuck() and bool(self.batch.landed)

    def step_done(self, done: StepDone) -> list[Action]:
        """Report the tokens of a step, and fetch the chunks of requests that have their blocks now."""
        actions: list[Action] = []
        for key in done.allocated:
            request = self.unallocated.pop(key)
            request.allocated = True
            actions += [self.kv_receive.fetch(chunk, request) for chunk in request.flow.announced.values()]
        items, ended = self.batch.step_done(done)
        for request, end in ended:
            self._finish(request, end)
        return [self.own.report(Tokens, items=items), *actions] if items else actions

    def _finish(self, request: DecodeRequest, end: End) -> None:
        self._leave(request)
        if self.estimator is not None and end.error is not None:
            self.estimator.forget(request.offer.rid)
        elif self.estimator is not None and not request.offer.sampling.ignore_eos:
            self.estimator.ended(request.offer.rid, request.written, end.reason)
        request.end = end

    # ------------------------------------------------------------ reports

    def resend(self, message: Resend) -> list[Action]:
        """Send the output tokens from index `message.start` on again, also those that were not due yet."""
        request = self._request_of(message.rid)
        if request is None or request.offer.attempt != message.attempt:
            return []
        ids = request.outputs()[message.start :]
        item = TokenItem(request.offer.rid, request.offer.attempt, message.start, ids, request.end)
        if request.running:
            self.batch.mark_sent(request)
        return [self.own.report(Tokens, items=[item])] if ids or request.end else []

    def holds(self) -> list[Hold]:
        """Return the requests for the heartbeat. `outputs` counts sent tokens only, so that the broker asks again only
        for lost ones."""
        held = [(request, request.offer) for request in self.requests.values()]
        return [Hold(offer.rid, offer.attempt, each.stage, len(offer.output) + each.sent) for each, offer in held]

    def waiting(self) -> int:
        """Return the number of requests that do not run yet."""
        return len(self.deferred) + len(self.moving) + len(self.batch.landed)

    def _request_of(self, rid: str) -> DecodeRequest | None:
        return self.requests[self._keys[rid]] if rid in self._keys else None

    def _stage(self, request: DecodeRequest, stage: Stage) -> Send:
        offer = request.offer
        return self.own.report(Staged, rid=offer.rid, attempt=offer.attempt, stage=stage, peer=offer.src)

    def _answer(self, kind: type[Answer], to: Offer | Chunk, **fields: Any) -> Send:
        return Send(to.src, kind(**self.own.address(to.rid, to.attempt, to.offer), **fields))

    def check(self) -> None:
        """Raise Broken when requests, ledger, indexes and forecast disagree."""
        if {request.offer.rid: key for key, request in self.requests.items()} != self._keys:
            raise Broken(f"requests and their index differ: {self._keys}")
        here, batch = [request for request in self.requests.values() if request.end is None], self.batch
        for request in here:
            if request.key not in self.ledger:
                raise Broken(f"{request.key} has no account")
            places = [place for place in (self.moving, batch.landed, batch.running) if request.key in place]
            expected = batch.running if request.running else batch.landed if request.landed_as else self.moving
            if places != [expected] or (request.key in self.unallocated) == request.allocated:
                raise Broken(f"{request.key} is not where a request in {request.stage} belongs")
        if len(here) != len(self.moving) + len(batch.landed) + len(batch.running):
            raise Broken("requests that are gone are still counted")
        self.deferred.check()
        if any(each.offer.rid in self._keys for each in self.deferred):
            raise Broken("a request is granted and deferred")
        self.kv_receive.check(self.moving.values())
        batch.check()
        self.forecast.check([*here, *self.deferred])
