"""The dispatcher of a prefill instance: offers a request to a decode instance, announces its KV chunks, and offers
it to another instance when the first one refuses or disappears, or when another has memory and the first has not."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable
from math import inf
from random import Random
from typing import Any

from tetri.core.actions import Action, Broken, Free, Send, StayRequest
from tetri.core.instance.activity import ActivityLog
from tetri.core.instance.identity import Identity
from tetri.core.instance.peers import Peers
from tetri.core.prefill.decode_pool import LivePool
from tetri.core.prefill.readers import Readers
from tetri.core.prefill.request import KVChunk, PrefillRequest
from tetri.core.timers import Timers
from tetri.policy.views import Need
from tetri.request import LengthRange
from tetri.wire.handover import BetweenWorkers, Chunk, Defer, Drop, Grant, LengthUpdate, Offer, Sibling


class Dispatcher:
    """Places requests on decode instances. Shares the prefill scheduler's `requests`, by key. Offers are numbered from
    1 for the life of the process."""

    def __init__(
        self,
        own: Identity,
        requests: dict[str, PrefillRequest],
        peers: Peers,
        timers: Timers[str],
        rng: Random,
        activity: ActivityLog,
    ) -> None:
        self.own, self.requests, self.timers, self.rng, self.activity = own, requests, timers, rng, activity
        self.pool = LivePool(own, peers)
        self.readers = Readers(own, self.pool, peers, rng)
        self.breaker = self.readers.breaker
        self.peers = peers
        self.offers: dict[int, str] = {}  # open offer -> request key
        self.deferred: dict[int, None] = {}  # those of them that wait for memory
        self.keeping: dict[str, PrefillRequest] = {}  # those whose KV has slots of the own slab (kv_send.py)
        self.unplaceable: dict[str, PrefillRequest] = {}  # too large for every connected decode instance
        self._unplaced: list[tuple[int, str]] = []  # turn and key, sorted; may contain requests that are placed or gone
        self._targets: dict[str, dict[int, None]] = {}  # instance -> open offers
        self._refused: dict[str, dict[str, str]] = {}  # request key -> decode instance -> why, since the last view
        self._checked_version = -1  # version of `peers` at the last check of `unplaceable`
        self._number = 0
        self._look_at = 0.0  # when the deferred offers look next for an instance that has memory

    def started(self, request: PrefillRequest, now: float) -> None:
        """Queue a started request for a decode instance. Its length prediction may take `length_wait_s` at most."""
        if request.unplaced:
            self._add_unplaced(request)
            if not request.predicted:
                self.timers.set(request.key, now + self.own.rules.length_wait_s)

    def settle(self, request: PrefillRequest, length: LengthRange | None) -> None:
        """Set the predicted length (None: unknown), so that the request waits no longer for a prediction."""
        request.predicted, request.length = True, length
        self.timers.clear(request.key)

    def correct(self, request: PrefillRequest, length: LengthRange) -> list[Action]:
        """Replace the length that `settle` set. If the request is on offer, send its decode instance a LengthUpdate."""
        same, request.length = length == request.length, length
        if same or request.flow.offer is None:
            return []
        return [Send(request.flow.target, LengthUpdate(**self.address(request), length=length))]

    @property
    def decodes_here(self) -> bool:
        """Whether this instance decodes too."""
        return self.pool.home is not None and self.pool.home.decodes()

    def stalled(self) -> bool:
        """Return whether a started request waits for memory of a decode instance."""
        first = self._first_unplaced()
        return bool(self.deferred) or (first is not None and first.predicted)

    def waiting(self) -> bool:
        """Return whether no decode instance has memory for a started request, for whatever reason."""
        return bool(self.deferred) or self._first_unplaced() is not None

    def _first_unplaced(self) -> PrefillRequest | None:
        """Return the first unplaced request, and drop the entries before it: their requests are placed or gone."""
        while self._unplaced:
            turn, key = self._unplaced[0]
            request = self.requests.get(key)
            if request is not None and request.turn == turn and request.unplaced:
                return request
            self._unplaced.pop(0)
        return None

    def allow_retry(self, now: float) -> list[Action]:
        """Dispatch again after a new membership or view: instances that refused may accept now."""
        self._refused.clear()
        return self.dispatch(now)

    def dispatch(self, now: float) -> list[Action]:
        """Offer the unplaced requests to decode instances in the order in which they started, up to the first for
        which there is no instance. No request overtakes another, otherwise a large one might never find memory. So all
        wait for a request whose length is being predicted, `length_wait_s` at most."""
        if not self._unplaced and not self.unplaceable:
            return []
        self.pool.refresh()
        if self.pool.unread or self.breaker.failing:
            self.breaker.warn(self.pool.unread, now)
        self._recheck_unplaceable()
        actions: list[Action] = []
        while (request := self._first_unplaced()) is not None:
            if request.pinned:
                request.wanted_at = now
                actions += self._offer_to(request.pinned, request, self._need(request), now)
            elif not self.pool.fits(request):
                self.unplaceable[request.key] = request
                request.unplaceable_since = now
            elif not request.predicted or not self._place(request, now, actions):
                break
            self._unplaced.pop(0)
        return actions

    def _recheck_unplaceable(self) -> None:
        """After a change of peers, queue the requests again for which a decode instance is large enough now. The rest
        wait for a new instance, and hold up no other request."""
        if self._checked_version == self.peers.version:
            return
        self._checked_version = self.peers.version
        for key, request in list(self.unplaceable.items()):
            if self.pool.fits(request):
                del self.unplaceable[key]
                request.unplaceable_since = None
                self._add_unplaced(request)

    def overdue(self, now: float, holds_up: Callable[[PrefillRequest], bool]) -> list[tuple[PrefillRequest, str, bool]]:
        """Return the unplaceable requests that must not wait any longer, each with the reason and whether to retry.

        A retry helps on another prefill instance, or here behind the requests that this one `holds_up`. Otherwise the
        request waits for `patience_s`: retries on this instance would only use up its attempts."""
        own, decodes = self.own, self.decodes_here
        found: list[tuple[PrefillRequest, str, bool]] = []
        for request in self.unplaceable.values():
            assert request.unplaceable_since is not None
            waited, blocks = now - request.unplaceable_since, request.flow.blocks
            only_here = decodes and request.fits(own.capacity)
            retry = waited <= own.patience_s
            elsewhere = only_here and self.peers.prefills(request.goal)
            if retry and (waited <= own.view_s or not (elsewhere or holds_up(request))):
                continue
            why = f"no decode instance could be reached for {min(waited, own.patience_s):.3g} s"
            if only_here:
                least = blocks + own.slots - own.open_slots
                why = (
                    f"only {own.iid} could decode the prompt of {blocks} KV blocks, but not beside its own prefill: "
                    f"set transfer.slab_blocks to {least} at least, or start another worker"
                )
            found.append((request, why, retry))
        return found

    def _place(self, request: PrefillRequest, now: float, actions: list[Action]) -> bool:
        """Offer a request to the instance that the policy chooses. If none has memory for it now, offer it where the
        least is wanted beyond what is free. Return whether there is an instance."""
        if request.wanted_at is None:
            request.wanted_at = now
        need, excluded = self._need(request), self._excluded(request, now)
        target = self.pool.choose(request, need, [*excluded, *request.lost], self.rng) if request.lost else None
        if target is None:
            target = self.pool.choose(request, need, excluded, self.rng)
        if target is None:
            target = self.pool.choose_later(request, excluded, self.rng)
        if target is not None:
            actions += self._offer_to(target, request, need, now)
        return target is not None

    def _need(self, request: PrefillRequest) -> Need:
        return request.need(self.own.rules, self.own.capacity.block_tokens)

    def _excluded(self, request: PrefillRequest, now: float) -> list[str]:
        excluded = [*self._refused.get(request.key, ())]
        if self.breaker.failing or request.avoid or request.flow.unread:
            excluded += self.readers.excluded(request, now)
        return excluded

    def _offer_to(self, target: str, request: PrefillRequest, need: Need, now: float) -> list[Action]:
        self._number += 1
        request.flow.aim(self._number, target, request.open())
        if target in self.breaker.failing:
            self.breaker.probe(target, self._number)
        self.offers[self._number] = request.key
        self._targets.setdefault(target, {})[self._number] = None
        self.activity.happened("offered", request.lead, target)
        if target == self.own.iid and request.may_stay and self.pool.home is not None:
            found = self.pool.home.stay(self._made_offer(request, now))
            if found is not None:
                return [*found[1], *self._stay(request, found[0])]
        self.pool.reserve(self._number, target, need)
        return self.repeat(request, now)

    def adapts(self) -> bool:
        """Return whether requests mostly decode on this instance: its role is auto."""
        return self.pool.home is not None and self.pool.home.adapts()

    def _stay(self, request: PrefillRequest, decode_key: str) -> list[Action]:
        """Let a request decode here, without a copy of its KV. What has left the engine already is of no use."""
        self.activity.happened("granted", request.lead, self.own.iid, "its KV stays in its place")
        self.keeping.pop(request.key, None)
        freed = [Free(handle) for handle in request.flow.stay(decode_key)]
        return [StayRequest(request.key, decode_key), *freed]

    def request_of(self, answer: BetweenWorkers) -> PrefillRequest | None:
        """Return the request that `answer` is about, or None when its offer is closed. An offer of this instance's
        earlier incarnation may have the same number, so request and attempt are compared too."""
        request = self.requests.get(self.offers.get(answer.offer, ""))
        if request is None:
            return None
        lead = request.flow.choices[0]
        known = (lead.rid, lead.attempt, request.flow.target)
        return request if known == (answer.rid, answer.attempt, answer.src) else None

    def granted(self, request: PrefillRequest, now: float) -> list[Action]:
        """Record that the decode instance has reserved memory for the request. Announce the chunks that it was not told
        of."""
        assert request.flow.offer is not None
        if request.flow.granted:
            return []
        self.activity.happened("granted", request.lead, request.flow.target)
        self._end_deferral(request)
        self.timers.set(request.key, now + self.own.offer_s)
        request.flow.grant()
        self.pool.answered(request.flow.offer, now)
        return self.announce(request, request.flow.unannounced())

    def defer(self, request: PrefillRequest, now: float) -> None:
        """Record that the decode instance has no memory now, and keeps the offer. A grant may have overtaken this. A
        canary goes nowhere else, so its offer is only repeated."""
        flow = request.flow
        assert flow.offer is not None
        if flow.granted or flow.deferred or request.pinned:
            return
        self.activity.happened("deferred", request.lead, flow.target)
        flow.deferred, self.deferred[flow.offer] = True, None
        self.pool.deferred(flow.offer, now)
        self._look_later(request, now)

    def _look_later(self, request: PrefillRequest, now: float) -> None:
        """Look for another instance within `look_s`. All deferred offers look at the same time, by the same view: then
        its loads are read once."""
        if self._look_at <= now:
            self._look_at = now + self.own.look_s
        self.timers.set(request.key, self._look_at)

    def _end_deferral(self, request: PrefillRequest) -> None:
        assert request.flow.offer is not None
        request.flow.deferred = False
        self.deferred.pop(request.flow.offer, None)

    def due(self, request: PrefillRequest, now: float) -> list[Action]:
        """Handle the timer of a request on offer."""
        return self._renew(request, now) if request.flow.deferred else self.repeat(request, now)

    def _renew(self, request: PrefillRequest, now: float) -> list[Action]:
        """Make a deferred offer to another instance if one has reported memory. Otherwise repeat it every `renew_s`, so
        that the decode instance keeps it."""
        self.pool.refresh()
        need = self._need(request)
        if self.peers.informed:
            others = [request.flow.target, *self._excluded(request, now)]
            better = self.pool.choose(request, need, others, self.rng)
            if better is not None:
                return [*self.withdraw(request, f"{better} has memory"), *self.dispatch(now)]
        self._look_later(request, now)
        return [self._offer(request, now)] if now - request.asked_at >= self.own.renew_s else []

    def repeat(self, request: PrefillRequest, now: float) -> list[Action]:
        """Send the offer and the chunks that the decode instance has not answered; it answers duplicates again.

        After the hand-over, announce all chunks again until the broker closes the request. This checks that the decode
        instance still has the KV: one that has lost it finds stale handles, and refuses."""
        self.timers.set(request.key, now + self.own.offer_s)
        flow = request.flow
        offer = [] if flow.granted else [self._offer(request, now)]
        announced = flow.sent[: flow.announced]
        again = flow.sent if flow.complete else [chunk for chunk in announced if chunk.index in flow.in_flight]
        return [*offer, *self.announce(request, again), *self.announce(request, flow.unannounced())]

    def announce(self, request: PrefillRequest, chunks: Iterable[KVChunk]) -> list[Action]:
        """Send Chunk messages to the decode instance that the request is on offer to."""
        return [self._announced(request, chunk) for chunk in chunks]

    def _announced(self, request: PrefillRequest, chunk: KVChunk) -> Send:
        last = chunk.stop == request.flow.blocks
        tokens, decoded_s = (request.firsts(), self.activity.now - request.computed_at) if last else ([], 0.0)
        message = Chunk(**self.address(request), **chunk.fields(), tokens=tokens, decoded_s=decoded_s)
        return Send(request.flow.target, message)

    def refused(self, request: PrefillRequest, why: str) -> None:
        """Close a refused offer and queue the request again. Ask that instance again only after a new view."""
        assert request.flow.offer is not None
        self._refused.setdefault(request.key, {})[request.flow.target] = why
        self.pool.refused(request.flow.offer)
        self._clear(request)
        self._queue_again(request)

    def reconnected(self, iid: str, now: float) -> list[Action]:
        """Repeat what may have been lost before the connection to an instance was (re)established."""
        actions: list[Action] = []
        for request in self.aimed_at(iid):
            self._end_deferral(request)
            actions += self.repeat(request, now)
        return actions

    def unread(self, request: PrefillRequest) -> None:
        """Close an offer whose KV could not be read and queue the request again. The breaker says whom to ask next."""
        assert request.flow.offer is not None
        self.pool.withdrawn(request.flow.offer)
        self._clear(request)
        self._queue_again(request)

    def withdraw(self, request: PrefillRequest, why: str) -> list[Action]:
        """Close the offer. Send a Drop unless the decode instance has all KV: then it keeps the request."""
        if request.flow.offer is None:
            return []
        actions = self._close_offer(request, why)
        self._queue_again(request)
        return actions

    def _close_offer(self, request: PrefillRequest, why: str) -> list[Action]:
        assert request.flow.offer is not None
        drop = [] if request.flow.complete else [Send(request.flow.target, Drop(**self.address(request), why=why))]
        if drop:
            self.pool.withdrawn(request.flow.offer)
        self._clear(request)
        return [*drop]

    def forget(self, request: PrefillRequest, why: str) -> list[Action]:
        """Remove a request that has ended or is given up, and withdraw its offer."""
        self.unplaceable.pop(request.key, None)
        self._refused.pop(request.key, None)
        self.timers.clear(request.key)
        return self.withdraw(request, why)

    def renounce(self, answer: Grant | Defer) -> Action:
        """Return a Drop for an answer whose offer is closed, so that the decode instance frees its memory."""
        address = self.own.address(answer.rid, answer.attempt, answer.offer)
        return Send(answer.src, Drop(**address, why="the offer is closed"))

    def aimed_at(self, iid: str) -> list[PrefillRequest]:
        """Return the requests on offer to an instance, also those handed over: the broker may not know that yet."""
        return [self.requests[self.offers[number]] for number in self._targets.get(iid, ())]

    def _add_unplaced(self, request: PrefillRequest) -> None:
        insort(self._unplaced, (request.turn, request.key))

    def _clear(self, request: PrefillRequest) -> None:
        number, target = request.flow.offer, request.flow.target
        assert number is not None
        del self.offers[number], self._targets[target][number]
        if target in self.breaker.failing:
            self.breaker.ended(target, number)
        if not self._targets[target]:
            del self._targets[target]
        self.timers.clear(request.key)
        self._end_deferral(request)
        request.flow.clear_aim()

    def _queue_again(self, request: PrefillRequest) -> None:
        if request.key in self.requests and request.unplaced:
            self._add_unplaced(request)

    def _offer(self, request: PrefillRequest, now: float) -> Send:
        return Send(request.flow.target, self._made_offer(request, now))

    def _made_offer(self, request: PrefillRequest, now: float) -> Offer:
        assert request.wanted_at is not None
        request.asked_at = now
        return Offer(
            **self.address(request),
            fingerprint=self.own.instance.fingerprint,
            prompt=list(request.prompt),
            output=list(request.output),
            sampling=request.sampling.changed(seed=request.flow.choices[0].seed),
            blocks=request.flow.blocks,
            length=request.length,
            waited_s=now - request.wanted_at,
            alone=request.alone,
            siblings=[Sibling(choice.rid, choice.attempt, choice.seed or 0) for choice in request.flow.choices[1:]],
            canary=bool(request.pinned),
            tpot_s=request.slo.tpot_s,
        )

    def address(self, request: PrefillRequest) -> dict[str, Any]:
        """Return the fields that identify the current offer in messages to the decode instance."""
        lead = request.flow.choices[0]
        return self.own.address(lead.rid, lead.attempt, request.flow.offer)

    def check(self) -> None:
        """Raise Broken when the indexes of offers and unplaced requests disagree with the requests."""
        waiting = {
            (each.turn, key) for key, each in self.requests.items() if each.unplaced and key not in self.unplaceable
        }
        if waiting - set(self._unplaced) or self._unplaced != sorted(self._unplaced):
            raise Broken(f"of {waiting} not all are in the line for a decode instance: {self._unplaced}")
        if any(self.requests.get(key) is not each or not each.unplaced for key, each in self.unplaceable.items()):
            raise Broken(f"unplaceable, and on offer or gone: {list(self.unplaceable)}")
        targets = {iid: list(numbers) for iid, numbers in self._targets.items()}
        counted: dict[str, list[int]] = {}
        for number, key in self.offers.items():
            if self.requests[key].flow.offer != number:
                raise Broken(f"offer {number} is not what {key} is on offer as")
            counted.setdefault(self.requests[key].flow.target, []).append(number)
        if targets != counted:
            raise Broken(f"offers by instance are {targets}, counted {counted}")
        deferred = {number for number, key in self.offers.items() if self.requests[key].flow.deferred}
        if deferred != {*self.deferred}:
            raise Broken(f"deferred offers are {deferred}, counted {list(self.deferred)}")
        reservations = self.pool.reservations
        if any(each.answered_at == inf and number not in self.offers for number, each in reservations.items()):
            raise Broken(f"claims of offers that are no more: {list(reservations)}")
