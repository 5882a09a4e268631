"""The hand-overs to a decode instance: offer -> reserve memory, now or later -> chunks land -> the choices part.

The choices of an offer share a hand-over until all KV has landed; from then on each is a request by itself, in the
batch. It stays here, with its tokens, until the broker closes it: until then others may ask for it again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from tetri.core.actions import Action, AddRequest, Adopted, Broken, CancelRequest, Send
from tetri.core.decode.batch import Batch
from tetri.core.decode.deferred import DeferredOffers
from tetri.core.decode.kv_receive import KVReceive
from tetri.core.decode.request import DecodeRequest, HandOver, KVInflow, key_of, obstacle
from tetri.core.instance.activity import ActivityLog
from tetri.core.instance.identity import Identity
from tetri.core.instance.ledger import Ledger
from tetri.core.instance.peers import Peers
from tetri.engine_request import EngineRequest
from tetri.request import LengthRange, Stage, Token
from tetri.wire.handover import BetweenWorkers, Chunk, Defer, Drop, Grant, Landed, LengthUpdate, Offer, Refuse
from tetri.wire.messages import Staged

Answer = Grant | Defer | Refuse | Landed
FreeMemory = Callable[[str, int], list[Action]]


class HandOvers:
    """Answers offers and brings their KV here. Shares the decode scheduler's batch and forecast.

    by_key        offers of which a choice is here, deferred ones included
    deferred      those for which there is no memory yet
    moving        those that were granted and whose KV has not all landed, by key
    requests      choices that were granted and the broker has not closed, by key; at most one attempt of each
    unallocated   those for which the engine has no blocks yet
    """

    def __init__(self, own: Identity, ledger: Ledger, peers: Peers, batch: Batch, activity: ActivityLog) -> None:
        self.own, self.ledger, self.peers, self.batch, self.forecast = own, ledger, peers, batch, batch.forecast
        self.kv_receive = KVReceive(activity)
        self.deferred = DeferredOffers(own.capacity.blocks, 3 * own.renew_s)
        self.by_key: dict[str, HandOver] = {}
        self.moving: dict[str, HandOver] = {}
        self.requests: dict[str, DecodeRequest] = {}
        self.unallocated: dict[str, DecodeRequest] = {}
        self._choices: dict[str, tuple[HandOver, DecodeRequest]] = {}  # all of all hand-overs, by rid

    def granted(self, rid: str, attempt: int) -> DecodeRequest | None:
        """Return this attempt of a choice, if it was granted and the broker has not closed it."""
        hand_over, request = self._choices.get(rid, (None, None))
        if hand_over is None or request is None or hand_over.key in self.deferred:
            return None
        return request if request.offer.attempt == attempt else None

    # ------------------------------------------------------------ offers

    def offer(self, message: Offer, now: float, free_memory: FreeMemory | None) -> list[Action]:
        """Reserve memory for all choices of an offer and grant it. Defer it until there is memory, or refuse it if it
        can never be served here. A later offer of a choice replaces an earlier one; an earlier one that comes late, or
        again, changes nothing. `free_memory`: see `grant_deferred`."""
        key = key_of(message)
        known = self.by_key.get(key)
        if known is not None and known.is_for(message):
            return self._offered_again(known, message, now)
        choices = message.choices()
        old = [(*self._choices[choice.rid], choice) for choice in choices if choice.rid in self._choices]
        if any(request.offer.attempt > choice.attempt for _, request, choice in old):
            return [self._answer(Refuse, message, why="a later attempt is here")]
        if any(request.follows(choice) for _, request, choice in old):
            return [self._answer(Refuse, message, why="a later offer is here")]
        landed = [hand_over for hand_over, request, choice in old if request.has_all_of(choice)]
        if landed and len(landed) == len(choices) and all(each is landed[0] for each in landed):
            return self._offered_anew(landed[0], message, now)
        if landed:  # nothing of what they have written may be written again
            return [self._answer(Refuse, message, why="KV of it is here under an earlier offer")]
        actions = [action for hand_over, request, _ in old for action in self._replace(hand_over, request)]
        actions += self._give_back(known) if known is not None else []  # of an earlier incarnation
        fresh, why = self._incoming(message, choices)
        if fresh is not None and self.deferred.enter(fresh, now, self.ledger.grantable(self.batch.kept_free())):
            self._enter(fresh)
        elif fresh is not None:
            why = f"offers of {self.deferred.blocks} blocks are deferred, that is enough"
        if why is not None:
            return [*actions, self._answer(Refuse, message, why=why)]
        actions += self.grant_deferred(now, free_memory)
        return [*actions, self._answer(Defer, message)] if key in self.deferred else actions

    def _replace(self, hand_over: HandOver, request: DecodeRequest) -> list[Action]:
        """Release an earlier attempt of a choice. One that stays is given up by its prefill too."""
        refuse = [self._answer(Refuse, request.offer, why="a later attempt is here")] if hand_over.stays else []
        return [*self._release(request), *refuse]

    def _offered_again(self, hand_over: HandOver, message: Offer, now: float) -> list[Action]:
        """Answer the same offer again. It has the newest length: a LengthUpdate may have been lost."""
        if hand_over.key in self.deferred:
            self._correct(hand_over, message.length)
            self.deferred.asked(hand_over, now)
            return [self._answer(Defer, message)]
        if message.length != hand_over.offer.length:
            self._correct(hand_over, message.length)
        return [self._answer(Grant, message)]

    def _offered_anew(self, hand_over: HandOver, message: Offer, now: float) -> list[Action]:
        """Go on under another number with what has landed."""
        again = self._offered_again(hand_over, message, now)
        del self.by_key[hand_over.key]
        hand_over.key, hand_over.offer = key_of(message), message
        self.by_key[hand_over.key] = hand_over
        for choice in message.choices():
            self._choices[choice.rid][1].offer = choice
        return again

    def _incoming(self, message: Offer, choices: Sequence[Offer]) -> tuple[HandOver | None, str | None]:
        """Return the hand-over of a new offer, or why it cannot be served here whatever memory becomes free."""
        why = obstacle(message, self.own.instance.fingerprint, self.own.capacity)
        if why is not None:
            return None, why
        way = self.peers.way(message.src, message.incarnation)
        if way is None:
            return None, f"{self.own.iid} does not know this incarnation of {message.src} yet, or has no path to its KV"
        key, flow, blocks = key_of(message), KVInflow(message.blocks, *way), message.blocks
        if key in self.kv_receive.fetching:
            return None, "KV that it brought before is still on its way"
        requests = {
            place: DecodeRequest(
                *(key_of(choice), choice, flow, place, message.length), alone=message.alone, blocks=blocks
            )
            for place, choice in enumerate(choices)
        }
        if message.receipt is not None:  # it has its first token already
            requests[0].first_at = self.batch.activity.now - message.decoded_s
        return HandOver(key, message, flow, requests), None

    def _enter(self, hand_over: HandOver) -> None:
        self.by_key[hand_over.key] = hand_over
        for request in hand_over.requests.values():
            self._choices[request.offer.rid] = hand_over, request
            self.forecast.enter(request)

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
        for hand_over in self.deferred.first(now):
            blocks = hand_over.blocks
            short = self.ledger.free < blocks + kept and not self.ledger.crowded(blocks)
            if short and free_memory is not None:
                actions += free_memory(hand_over.offer.rid, blocks + kept)
            if self.ledger.reserve(hand_over.engine_keys(), hand_over.flow.blocks, kept):
                actions += self._grant(hand_over)
        return actions

    def kept_blocks(self) -> int:
        """Return how many of the free blocks no offer gets now."""
        return max(self.ledger.free, 0) - self.ledger.grantable(self.batch.kept_free())

    def _grant(self, hand_over: HandOver) -> list[Action]:
        offer = hand_over.offer
        self.deferred.leave(hand_over)
        self.moving[hand_over.key] = hand_over
        tokens, actions = tuple(offer.tokens), list[Action]()
        for key, request in zip(hand_over.engine_keys(), hand_over.requests.values(), strict=True):
            self.requests[key] = self.unallocated[key] = request
            engine_request = EngineRequest(
                *(key, "decode", tokens, len(offer.prompt), request.offer.sampling), ahead=offer.ahead
            )
            actions.append(AddRequest(engine_request))
        return [*actions, self._answer(Grant, offer)]

    def expire(self, now: float) -> list[Action]:
        """Refuse the deferred offers that their prefill instances have not repeated for long. Those that still want
        one offer it again."""
        return [
            action
            for hand_over in self.deferred.expired(now)
            for action in self._refuse(hand_over, why="the offer was not repeated")
        ]

    # ------------------------------------------------------------ requests that stay

    def stay(self, offer: Offer) -> tuple[str, list[Action]] | None:
        """Expect a request whose prefill runs on this engine. Its memory is the prefill's, which grows into its own.
        Return its key; None if a later attempt of it is here, or it can never run here."""
        key, actions = key_of(offer), list[Action]()
        hand_over, request = self._choices.get(offer.rid, (None, None))
        if hand_over is not None and request is not None:
            if request.offer.attempt >= offer.attempt:
                return None
            actions = self._replace(hand_over, request)
        if key in self.by_key or obstacle(offer, self.own.instance.fingerprint, self.own.capacity) is not None:
            return None
        flow = KVInflow(offer.blocks, "none", "")
        made = DecodeRequest(key, offer, flow, length=offer.length, alone=offer.alone, stays=True, blocks=offer.blocks)
        made.allocated = True
        hand_over = HandOver(key, offer, flow, {0: made}, ready=True)
        self._enter(hand_over)
        self.moving[key], self.requests[key] = hand_over, made
        return key, actions

    def land(self, key: str, token: Token) -> list[Action]:
        """The prefill of a request that stays has ended: all its KV is there."""
        hand_over = self.by_key[key]
        hand_over.tokens, hand_over.flow.landed = [token], {0: hand_over.flow.blocks}
        return self._land(hand_over)

    # ------------------------------------------------------------ chunks

    def chunk(self, message: Chunk) -> list[Action]:
        """Fetch an announced chunk, once the engine has the blocks of all choices."""
        hand_over = self.by_key.get(key_of(message))
        if hand_over is None or not hand_over.is_for(message):
            _, request = self._choices.get(message.rid, (None, None))
            self.kv_receive.stray(message, request)
            return [self._answer(Refuse, message, why="no such offer here")]
        if self.kv_receive.is_duplicate(message, hand_over):
            here = hand_over.landed or message.index in hand_over.flow.landed
            return [self._answer(Landed, message, index=message.index)] if here else []
        why = self.kv_receive.announced(message, hand_over)
        if why is not None:
            return [self._answer(Refuse, message, why=why), *self._give_back(hand_over)]
        fetches = hand_over.ready and hand_over.flow.broken is None
        actions: list[Action] = [self.kv_receive.fetch(message, hand_over)] if fetches else []
        for place, token in enumerate(message.tokens):
            request = hand_over.requests.get(place)
            if request is not None and token is not None:
                request.first_at = self.batch.activity.now - message.decoded_s
            elif request is not None:
                actions += self._release(request)
        return actions

    def adopted(self, event: Adopted, now: float) -> list[Action]:
        """Handle the result of a fetch. When all KV has landed, each choice waits for admission."""
        hand_over = self.moving.get(event.key)
        retries = self.kv_receive.adopted(event, hand_over, now)
        if hand_over is None:
            return []
        flow = hand_over.flow
        if flow.broken is not None:  # the engine must keep its blocks until no fetch is pending
            refusal = {"why": flow.broken, "corrupt": flow.corrupt, "unread": True}
            return [] if event.key in self.kv_receive.fetching else self._refuse(hand_over, **refusal)
        if event.index not in flow.landed:
            return [*retries]
        landed = self._answer(Landed, hand_over.offer, index=event.index)
        return [landed, *self._land(hand_over)] if flow.complete else [landed]

    def _land(self, hand_over: HandOver) -> list[Action]:
        del self.moving[hand_over.key]
        hand_over.landed, shares = True, False
        actions: list[Action] = []
        for place, request in hand_over.requests.items():
            token = None if hand_over.written else hand_over.tokens[place]
            tokens = hand_over.written if token is None else [token]
            assert tokens
            request.shares, shares = shares, True
            self.batch.land(request, tokens)
            actions.append(staged(self.own, request, Stage.WAITING))
        return actions

    def allocated(self, key: str) -> list[Action]:
        """The engine has the blocks of a granted choice: fetch its chunks if it has those of all choices."""
        request = self.unallocated.pop(key)
        request.allocated = True
        return self._fetch_when_ready(self._choices[request.offer.rid][0])

    def _fetch_when_ready(self, hand_over: HandOver) -> list[Action]:
        """Fetch the announced chunks once the engine has the blocks of all choices."""
        if hand_over.ready or not all(request.allocated for request in hand_over.requests.values()):
            return []
        hand_over.ready = True
        return [self.kv_receive.fetch(chunk, hand_over) for chunk in hand_over.flow.announced.values()]

    def fetch_again(self, now: float) -> list[Action]:
        """Fetch lost chunks again after their pause."""
        places = [(self.moving[key], index) for key, index in self.kv_receive.due(now)]
        return [self.kv_receive.fetch(hand_over.flow.announced[index], hand_over) for hand_over, index in places]

    # ------------------------------------------------------------ letting go

    def drop(self, message: Drop) -> list[Action]:
        """Release a hand-over whose offer is withdrawn, unless all its KV has landed."""
        hand_over = self.by_key.get(key_of(message))
        if hand_over is None or hand_over.landed or not hand_over.is_for(message):
            return []
        return self._give_back(hand_over)

    def reject(self, key: str, why: str) -> list[Action]:
        """Refuse a hand-over of which the engine can never run a request."""
        request = self.requests.get(key)
        if request is None:
            return []  # it was released with another choice
        hand_over, _ = self._choices[request.offer.rid]
        alone = len(hand_over.requests) == 1 or not hand_over.landed
        return self._refuse(hand_over, why=why) if alone else self._release(request)

    def orphaned(self, src: str) -> list[Action]:
        """Release the hand-overs whose KV was still moving from a prefill instance that has disappeared."""
        self.kv_receive.unread.pop(src, None)
        orphans = [each for each in (*self.moving.values(), *self.deferred) if each.offer.src == src]
        return [action for hand_over in orphans for action in self._give_back(hand_over)]

    def close(self, rid: str, attempt: int) -> list[Action]:
        """Forget a choice up to this attempt, in any stage."""
        _, request = self._choices.get(rid, (None, None))
        return self._release(request) if request is not None and request.offer.attempt <= attempt else []

    def _refuse(self, hand_over: HandOver, **fields: Any) -> list[Action]:
        return [self._answer(Refuse, hand_over.offer, **fields), *self._give_back(hand_over)]

    def _give_back(self, hand_over: HandOver) -> list[Action]:
        """Release all choices of a hand-over, granted or deferred."""
        return [action for request in [*hand_over.requests.values()] for action in self._release(request)]

    def _release(self, request: DecodeRequest) -> list[Action]:
        """Release a choice, in any stage. The others of its hand-over go on."""
        hand_over, _ = self._choices.pop(request.offer.rid)
        deferred, moving = hand_over.key in self.deferred, hand_over.key in self.moving
        if deferred and len(hand_over.requests) == 1:
            self.deferred.leave(hand_over)
        elif deferred:
            self.deferred.shrink(request.blocks)
        del hand_over.requests[request.place]
        if not hand_over.requests:
            del self.by_key[hand_over.key]
            self.moving.pop(hand_over.key, None)
            self.kv_receive.forget(hand_over)
        if deferred:
            self.forecast.leave(request)
            return []
        del self.requests[request.key]
        if request.end is not None:
            return []
        self.leave(request)
        rest = self._fetch_when_ready(hand_over) if moving and hand_over.requests else ()
        return [CancelRequest(request.key), *rest]

    def leave(self, request: DecodeRequest) -> None:
        """Free everything that a granted choice uses here."""
        self.unallocated.pop(request.key, None)
        self.batch.leave(request)
        self.forecast.leave(request)
        self.ledger.close(request.key)

    # ------------------------------------------------------------ answers again

    def repeat(self, src: str) -> list[Action]:
        """Send again what a prefill instance may have missed before its connection was (re)established."""
        actions: list[Action] = []
        for hand_over in [each for each in self.by_key.values() if each.offer.src == src]:
            if hand_over.key in self.deferred or all(request.end for request in hand_over.requests.values()):
                continue
            actions.append(self._answer(Grant, hand_over.offer))
            actions += [self._answer(Landed, hand_over.offer, index=index) for index in hand_over.flow.landed]
        return actions

    def resend_answers(self) -> list[Action]:
        """Send the grants of moving hand-overs again, and the Defer of the offer that is next. A prefill instance that
        has withdrawn the offer, and whose Drop was lost, answers with another Drop."""
        moving = [hand_over for hand_over in self.moving.values() if not hand_over.stays]
        answers: list[Action] = [self._answer(Grant, hand_over.offer) for hand_over in moving]
        answers += [self._answer(Defer, hand_over.offer) for hand_over in islice(self.deferred, 1)]
        return answers

    def _answer(self, kind: type[Answer], to: BetweenWorkers, **fields: Any) -> Send:
        return Send(to.src, kind(**self.own.address(to.rid, to.attempt, to.offer), **fields))

    # ------------------------------------------------------------ predicted lengths

    def update_length(self, message: LengthUpdate) -> list[Action]:
        """Set a better length range that the prefill instance has sent."""
        hand_over = self.by_key.get(key_of(message))
        if hand_over is not None and hand_over.is_for(message):
            self._correct(hand_over, message.length)
        return []

    def _correct(self, hand_over: HandOver, length: LengthRange | None) -> None:
        """Set a better length range of its choices, if there is one."""
        if length is None:
            return
        deferred = hand_over.key in self.deferred
        for request in hand_over.requests.values():
            if deferred and length != request.length:
                self.forecast.update_length(request, length)
            elif not deferred and request.end is None and not request.estimated:
                self.batch.update_length(request, length)

    def check(self) -> None:
        """Raise Broken when hand-overs, requests, ledger, indexes and forecast disagree."""
        choices = [(hand_over, each) for hand_over in self.by_key.values() for each in hand_over.requests.values()]
        if {each.offer.rid: (hand_over, each) for hand_over, each in choices} != self._choices:
            raise Broken(f"hand-overs and their index differ: {list(self._choices)}")
        if any(key != each.key or not each.requests for key, each in self.by_key.items()):
            raise Broken("a hand-over has another key, or no choice")
        if {each.key: each for hand_over, each in choices if hand_over.key not in self.deferred} != self.requests:
            raise Broken(f"granted are others than {list(self.requests)}")
        open_choices = [(hand_over, each) for hand_over, each in choices if each.end is None]
        for hand_over, request in open_choices:
            if hand_over.key not in self.deferred:
                self._check_place(hand_over, request)
        landed = sum(hand_over.landed for hand_over, _ in open_choices)
        batch = self.batch
        held = len(batch.landed) + len(batch.running) + len(batch.stopped)
        if landed != held or self.moving.keys() - self.by_key.keys():
            raise Broken("requests that are gone are still counted")
        self.deferred.check()
        self.kv_receive.check(self.moving.values())
        self.forecast.check([request for _, request in open_choices])

    def _check_place(self, hand_over: HandOver, request: DecodeRequest) -> None:
        """Raise Broken unless a granted request that has not ended is where it belongs."""
        batch, moving = self.batch, hand_over.key in self.moving
        if (request.key in self.ledger) is hand_over.stays:
            raise Broken(f"{request.key} has no account, or two")
        places = [place for place in (batch.landed, batch.running, batch.stopped) if request.key in place]
        running = request.running == (request.key in batch.running)
        unallocated = request.key in self.unallocated
        right = running and len(places) == hand_over.landed
        if not right or moving == hand_over.landed or unallocated == request.allocated:
            raise Broken(f"{request.key} is not where a request in {request.stage} belongs")
        if moving and hand_over.ready != all(each.allocated for each in hand_over.requests.values()):
            raise Broken(f"{hand_over.key} has its blocks and is not fetched, or the reverse")


def staged(own: Identity, request: DecodeRequest, stage: Stage) -> Send:
    """The report to the broker that a request has entered a stage."""
    offer = request.offer
    return own.report(Staged, rid=offer.rid, attempt=offer.attempt, stage=stage, peer=offer.src)
