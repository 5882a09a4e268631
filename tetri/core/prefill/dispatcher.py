"""The dispatcher of a prefill worker: asks a decode instance to take a request, announces its chunks to it, and
asks another one when it is refused or the first is gone."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from random import Random
from typing import Any

from tetri.core.actions import Action, Broken, Send
from tetri.core.instance.identity import Identity
from tetri.core.instance.peers import Peers
from tetri.core.prefill.decode_pool import LivePool
from tetri.core.prefill.request import KVChunk, PrefillRequest
from tetri.core.timers import Timers
from tetri.request import LengthRange
from tetri.wire.handover import BetweenWorkers, Chunk, Drop, Grant, LengthUpdate, Offer


class Dispatcher:
    """Shares the prefill scheduler's `requests`, by key. Offers are numbered from 1 for the life of the process."""

    def __init__(
        self, own: Identity, requests: dict[str, PrefillRequest], peers: Peers, timers: Timers[str], rng: Random
    ) -> None:
        self.own, self.requests, self.timers, self.rng = own, requests, timers, rng
        self.pool = LivePool(own, peers)
        self.peers = peers
        self.offers: dict[int, str] = {}  # open offers -> job key
        self.unplaceable: dict[str, PrefillRequest] = {}  # no decode instance that is there could ever hold them
        self._unplaced: list[tuple[int, str]] = []  # turn and key, sorted; whoever is placed or gone may still be in it
        self._targets: dict[str, dict[int, None]] = {}  # instance -> open offers
        self._refused: dict[str, dict[str, str]] = {}  # job key -> decode instance -> why, since the last view
        self._judged = -1  # as of which version of the neighbours jobs were stranded
        self._number = 0

    def started(self, request: PrefillRequest, now: float) -> None:
        """It wants a decode instance from now on, and waits for its predicted length only so long."""
        if request.unplaced:
            self._wants(request)
            if not request.predicted:
                self.timers.set(request.key, now + self.own.rules.length_wait_s)

    def settle(self, request: PrefillRequest, length: LengthRange | None) -> None:
        """So long it will be, as far as anybody can say: it waits for that no longer."""
        request.predicted, request.length = True, length
        self.timers.clear(request.key)

    def correct(self, request: PrefillRequest, length: LengthRange) -> list[Action]:
        """More is known than when it was settled. Who has been asked is told; nobody waits for that to arrive."""
        if length == request.length:
            return []
        request.length = length
        if request.flow.offer is None:
            return []
        return [Send(request.flow.target, LengthUpdate(**self.address(request), length=length))]

    def stalled(self) -> bool:
        """Whether a prompt that has started, and all behind it, wait for a decode instance that takes it."""
        first = self._first()
        return first is not None and first.predicted

    def waiting(self) -> bool:
        """Whether a prompt that has started is on offer nowhere yet, for whatever reason."""
        return self._first() is not None

    def _first(self) -> PrefillRequest | None:
        for turn, key in self._unplaced:
            request = self.requests.get(key)
            if request is not None and request.turn == turn and request.unplaced:
                return request
        return None

    def allow_retry(self, now: float) -> list[Action]:
        """There is news of the others: who refused may be asked again."""
        self._refused.clear()
        return self.dispatch(now)

    def dispatch(self, now: float) -> list[Action]:
        """Ask a decode instance for every job that needs one, in the order in which they were started, up to the
        first for which there is none. None is overtaken, or a large one might never find memory; so all wait for one
        whose length is still being predicted, `length_wait_s` at most."""
        if not self._unplaced and not self.unplaceable:
            return []
        self.pool.refresh()
        self._judge_again()
        actions: list[Action] = []
        while self._unplaced:
            turn, key = self._unplaced[0]
            request = self.requests.get(key)
            if request is not None and request.turn == turn and request.unplaced:
                if not self.pool.fits(request):
                    self.unplaceable[key] = request
                    request.unplaceable_since = now
                elif not request.predicted or not self._place(request, now, actions):
                    break
            self._unplaced.pop(0)
        return actions

    def _judge_again(self) -> None:
        """Other instances are there: for some jobs there may be one now. Those that still have none may wait for an
        instance that comes, but nobody waits for them."""
        if self._judged == self.peers.version:
            return
        self._judged = self.peers.version
        for key, request in list(self.unplaceable.items()):
            if self.pool.fits(request):
                del self.unplaceable[key]
                request.unplaceable_since = None
                self._wants(request)

    def overdue(self, now: float, holds_up: Callable[[PrefillRequest], bool]) -> list[tuple[PrefillRequest, str, bool]]:
        """Stranded jobs that must not wait any longer: why, and whether another attempt may do better: elsewhere, or
        here behind those that it `holds_up`. With nobody else there, attempt after attempt here would use them up."""
        own, found, decodes = self.own, list[tuple[PrefillRequest, str, bool]](), self.pool.home() is not None
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
                    f"only {own.iid} could decode its prompt of {blocks} KV blocks, and not beside its own prefill: "
                    f"set transfer.slab_blocks to {least} at least, or start another worker"
                )
            found.append((request, why, retry))
        return found

    def _place(self, request: PrefillRequest, now: float, actions: list[Action]) -> bool:
        need = request.need(self.own.rules, self.own.capacity.block_tokens)
        target = self.pool.choose(request, need, self._refused.get(request.key, ()), self.rng)
        if target is None:
            return False
        self._number += 1
        request.flow.aim(self._number, target)
        self.pool.reserve(self._number, target, need)
        self.offers[self._number] = request.key
        self._targets.setdefault(target, {})[self._number] = None
        actions += self.repeat(request, now)
        return True

    def request_of(self, answer: BetweenWorkers) -> PrefillRequest | None:
        """The job that this answers an offer for, None when the offer is an old one: perhaps of this instance's
        earlier incarnation, which numbered its offers from 1 too."""
        request = self.requests.get(self.offers.get(answer.offer, ""))
        if request is None or (request.rid, request.attempt, request.flow.target) != (
            answer.rid,
            answer.attempt,
            answer.src,
        ):
            return None
        return request

    def granted(self, request: PrefillRequest, now: float) -> None:
        assert request.flow.offer is not None
        request.flow.grant()
        self.pool.granted(request.flow.offer, now)

    def repeat(self, request: PrefillRequest, now: float) -> list[Action]:
        """Say to the target all that it has not answered. What it knows already it answers again. When it has
        all, ask by the same words whether it still has: until the broker closes the job, nobody else knows. Of
        what it lost, the handles are old ones, and it refuses."""
        self.timers.set(request.key, now + self.own.offer_s)
        offer = [] if request.flow.granted else [self._offer(request)]
        in_flight = request.flow.sent if request.flow.complete else request.flow.in_flight.values()
        return [*offer, *(action for kv_chunk in in_flight for action in self.announce(request, kv_chunk))]

    def announce(self, request: PrefillRequest, kv_chunk: KVChunk) -> list[Action]:
        if request.flow.offer is None:
            return []
        chunk = Chunk(
            **self.address(request),
            index=kv_chunk.index,
            start=kv_chunk.start,
            stop=kv_chunk.stop,
            handle=kv_chunk.handle,
            digest=kv_chunk.digest,
            token=kv_chunk.token,
        )
        return [Send(request.flow.target, chunk)]

    def refused(self, request: PrefillRequest, why: str) -> None:
        """The target does not take it: another one must, or the same when there is news of its load."""
        assert request.flow.offer is not None
        self._refused.setdefault(request.key, {})[request.flow.target] = why
        self.pool.refused(request.flow.offer)
        self._clear(request)

    def withdraw(self, request: PrefillRequest, why: str) -> list[Action]:
        """Take an offer back; the decode side keeps a request whose KV it has completely."""
        if request.flow.offer is None:
            return []
        drop = [] if request.flow.complete else [Send(request.flow.target, Drop(**self.address(request), why=why))]
        if drop:
            self.pool.withdrawn(request.flow.offer)
        self._clear(request)
        return [*drop]

    def forget(self, request: PrefillRequest, why: str) -> list[Action]:
        """The job is no longer among the others."""
        self.unplaceable.pop(request.key, None)
        self._refused.pop(request.key, None)
        self.timers.clear(request.key)
        return self.withdraw(request, why)

    def renounce(self, grant: Grant) -> Action:
        """Take back what was granted to an offer that is no more."""
        drop = Drop(
            src=self.own.iid,
            incarnation=self.own.incarnation,
            rid=grant.rid,
            attempt=grant.attempt,
            offer=grant.offer,
            why="no such offer any more",
        )
        return Send(grant.src, drop)

    def aimed_at(self, iid: str) -> list[PrefillRequest]:
        """Jobs on offer to this instance, those included whose KV is all there: the broker may not know it yet."""
        return [self.requests[self.offers[number]] for number in self._targets.get(iid, ())]

    def _wants(self, request: PrefillRequest) -> None:
        insort(self._unplaced, (request.turn, request.key))

    def _clear(self, request: PrefillRequest) -> None:
        number, target = request.flow.offer, request.flow.target
        assert number is not None
        del self.offers[number], self._targets[target][number]
        if not self._targets[target]:
            del self._targets[target]
        self.timers.clear(request.key)
        request.flow.clear_aim()
        if request.key in self.requests and request.unplaced:
            self._wants(request)

    def _offer(self, request: PrefillRequest) -> Send:
        offer = Offer(
            **self.address(request),
            fingerprint=self.own.instance.fingerprint,
            prompt=list(request.prompt),
            output=list(request.output),
            sampling=request.sampling,
            blocks=request.flow.blocks,
            length=request.length,
        )
        return Send(request.flow.target, offer)

    def address(self, request: PrefillRequest) -> dict[str, Any]:
        """What the target knows its offer by."""
        return {
            "src": self.own.iid,
            "incarnation": self.own.incarnation,
            "rid": request.rid,
            "attempt": request.attempt,
            "offer": request.flow.offer,
        }

    def check(self) -> None:
        """Count everything again."""
        wanting = {
            (request.turn, key)
            for key, request in self.requests.items()
            if request.unplaced and key not in self.unplaceable
        }
        if wanting - set(self._unplaced) or self._unplaced != sorted(self._unplaced):
            raise Broken(f"of {wanting} not all are in the line for a decode instance: {self._unplaced}")
        if any(
            self.requests.get(key) is not request or not request.unplaced for key, request in self.unplaceable.items()
        ):
            raise Broken(f"stranded, and on offer or gone: {list(self.unplaceable)}")
        targets = {iid: list(numbers) for iid, numbers in self._targets.items()}
        aimed: dict[str, list[int]] = {}
        for number, key in self.offers.items():
            if self.requests[key].flow.offer != number:
                raise Broken(f"offer {number} is not what {key} is on offer as")
            aimed.setdefault(self.requests[key].flow.target, []).append(number)
        if targets != aimed:
            raise Broken(f"offers by instance are {targets}, counted {aimed}")
        if any(
            reservation.granted_at is None and number not in self.offers
            for number, reservation in self.pool.reservations.items()
        ):
            raise Broken(f"claims of offers that are no more: {list(self.pool.reservations)}")
