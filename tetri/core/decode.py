"""The decode half of a worker: offer -> reserve -> chunks land -> wait -> admit -> tokens, step by step.

A seat is kept, with its tokens, until the broker closes it: until then the broker can ask for them again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tetri.core.actions import BROKER, Action, AddLeg, AdmitLeg, Adopted, Broken, CancelLeg, Send
from tetri.core.batch import Batch
from tetri.core.foresight import Foresight
from tetri.core.kvflow import Inflow
from tetri.core.landing import Landing
from tetri.core.ledger import Ledger
from tetri.core.outlook import Outlook
from tetri.core.peers import Identity
from tetri.core.seat import Seat, obstacle
from tetri.core.turned_away import TurnedAway
from tetri.leg import Foretold, Leg, Sampled, Span
from tetri.request import LengthRange, Stage
from tetri.wire.handover import Chunk, Drop, Foreseen, Grant, Landed, Offer, Refuse
from tetri.wire.messages import End, Hold, Resend, Staged, TokenItem, Tokens

Answer = Grant | Refuse | Landed


class Decode:
    """`seats` by key, at most one per request. `moving`: those whose KV has not all landed. `bare`: those for which
    the engine has no blocks yet. `make_room` is asked when a request, by its id, finds too few blocks: what the other
    half does to give it so many, nothing if it cannot. `way` says over which path KV comes from an instance, by its
    id and incarnation, and out of which segment. `foresight` is that of the worker, where lengths are learned."""

    def __init__(
        self,
        own: Identity,
        ledger: Ledger,
        make_room: Callable[[str, int], list[Action]],
        way: Callable[[str, int], tuple[str, str] | None],
        foresight: Foresight | None = None,
    ) -> None:
        self.foresight = foresight
        self.own, self.ledger, self.make_room, self.way = own, ledger, make_room, way
        self.landing = Landing()
        self.turned = TurnedAway(3 * max(own.load_s, own.beat_s))  # with every view and every beat they ask again
        self.outlook = Outlook(own, foresight)
        self.batch = Batch(own, ledger, self.outlook)
        self.seats: dict[str, Seat] = {}
        self.moving: dict[str, Seat] = {}
        self.bare: dict[str, Seat] = {}
        self._keys: dict[str, str] = {}  # rid -> key

    # ------------------------------------------------------------ the hand-over

    def offer(self, message: Offer, now: float) -> list[Action]:
        seat = self._seat_of(message.rid)
        if seat is not None and seat.offer.attempt > message.attempt:
            return [self._answer(Refuse, message, why="a later attempt is here")]
        if seat is not None and (seat.is_for(message) or seat.has_all_of(message)):
            if message.length is not None and message.length != seat.offer.length:
                self._correct(seat, message.length)  # a Foreseen may have been lost
            seat.offer = seat.offer if seat.is_for(message) else message  # the same under another number
            return [self._answer(Grant, message)]
        actions = self._release(seat) if seat else []
        why = obstacle(message, self.own.instance.fingerprint, self.own.capacity)
        way = self.way(message.src, message.incarnation)
        if why is None and way is None:
            why = f"{self.own.iid} does not know this start of {message.src} yet, or no path to its KV"
        key = f"d:{message.rid}:{message.attempt}:{message.src}:{message.offer}"
        if key in self.landing.taking:
            why = "KV that it brought before is still on its way"
        if why is not None or way is None:
            return [*actions, self._answer(Refuse, message, why=why)]
        kept = self.batch.kept_free()
        why = self.turned.before(message.rid, message.blocks, self.ledger, kept, now)
        if why is None:
            if self.ledger.free < message.blocks + kept and not self.ledger.crowded(message.blocks):
                actions += self.make_room(message.rid, message.blocks + kept)
            why = self.ledger.reserve(key, message.blocks, kept)
        if why is not None:
            self.turned.enter(message.rid, message.blocks, now)
            return [*actions, self._answer(Refuse, message, why=why)]
        self.turned.leave(message.rid)
        seat = Seat(key, message, Inflow(message.blocks, *way), message.length, blocks=message.blocks)
        self.seats[key] = self.moving[key] = self.bare[key] = seat
        self._keys[message.rid] = key
        self.outlook.enter(seat)
        tokens = (*message.prompt, *message.output)
        leg = Leg(key, "decode", tokens, len(message.prompt), message.sampling)
        return [*actions, AddLeg(leg), self._answer(Grant, message)]

    def chunk(self, message: Chunk) -> list[Action]:
        seat = self._seat_of(message.rid)
        if seat is None or not seat.is_for(message):
            self.landing.stray(message, seat)
            return [self._answer(Refuse, message, why="no such offer here")]
        if self.landing.again(message, seat):
            here = seat.landed_as or message.index in seat.flow.landed
            return [self._answer(Landed, message, index=message.index)] if here else []
        why = self.landing.announced(message, seat)
        if why is not None:
            return [self._answer(Refuse, message, why=why), *self._release(seat)]
        return [self.landing.take(message, seat)] if seat.allocated and seat.flow.broken is None else []

    def adopted(self, event: Adopted, now: float) -> list[Action]:
        seat = self.seats.get(event.key)
        again = self.landing.adopted(event, seat, now)
        if seat is None:
            return []
        flow = seat.flow
        if flow.broken is not None:  # the engine must know the leg until the last copy is made
            refuse = self._answer(Refuse, seat.offer, why=flow.broken, spoilt=flow.spoilt)
            return [] if seat.key in self.landing.taking else [refuse, *self._release(seat)]
        if event.index not in flow.landed:
            return [*again]
        actions: list[Action] = [self._answer(Landed, seat.offer, index=event.index)]
        if flow.complete:
            assert flow.token is not None
            del self.moving[seat.key]
            self.batch.land(seat, flow.token)
            actions.append(self._stage(seat, Stage.WAITING))
        return actions

    def take_again(self, now: float) -> list[Action]:
        """Chunks that were lost, some time ago."""
        places = [(self.seats[key], index) for key, index in self.landing.due(now)]
        return [self.landing.take(seat.flow.announced[index], seat) for seat, index in places]

    def drop(self, message: Drop) -> list[Action]:
        seat = self._seat_of(message.rid)
        return self._release(seat) if seat is not None and seat.is_for(message) and not seat.landed_as else []

    def reject(self, key: str, why: str) -> list[Action]:
        """The engine cannot run this leg."""
        seat = self.seats[key]
        return [self._answer(Refuse, seat.offer, why=why), *self._release(seat, in_engine=False)]

    def orphaned(self, src: str) -> list[Action]:
        """A prefill instance is gone: what it had not sent completely never comes."""
        return [action for seat in [*self.moving.values()] if seat.offer.src == src for action in self._release(seat)]

    def repeat(self, src: str) -> list[Action]:
        """The connection to a prefill instance stands (again): repeat what it may have missed."""
        actions: list[Action] = []
        for seat in [seat for seat in self.seats.values() if seat.offer.src == src and not seat.end]:
            actions.append(self._answer(Grant, seat.offer))
            actions += [self._answer(Landed, seat.offer, index=index) for index in seat.flow.landed]
        return actions

    def remind(self) -> list[Action]:
        """Tell of the grants whose KV is not all there: a prefill instance that took its offer back, while it
        could not say so, says so now."""
        return [self._answer(Grant, seat.offer) for seat in self.moving.values()]

    def close(self, rid: str, attempt: int) -> list[Action]:
        self.turned.leave(rid)
        seat = self._seat_of(rid)
        return self._release(seat) if seat is not None and seat.offer.attempt <= attempt else []

    def _release(self, seat: Seat, *, in_engine: bool = True) -> list[Action]:
        del self.seats[seat.key], self._keys[seat.offer.rid]
        if seat.end is not None:
            return []
        self._leave(seat)
        return [CancelLeg(seat.key)] if in_engine else []

    def _leave(self, seat: Seat) -> None:
        """It takes nothing here any more."""
        self.landing.forget(seat)
        self.moving.pop(seat.key, None)
        self.bare.pop(seat.key, None)
        self.batch.leave(seat)
        self.outlook.leave(seat)
        self.ledger.close(seat.key)

    # ------------------------------------------------------------ predicted lengths

    def foreseen(self, message: Foreseen) -> list[Action]:
        """The prefill side knows more of its length than when it was offered."""
        seat = self._seat_of(message.rid)
        if seat is not None and seat.is_for(message):
            self._correct(seat, message.length)
        return []

    def _correct(self, seat: Seat, length: LengthRange) -> None:
        if seat.end is None and not seat.foretold:
            self.batch.foreseen(seat, length)

    def foretold(self, told: Foretold) -> None:
        """Its own hidden state says how much follows; of no use when it has just ended, or its length is fixed."""
        seat = self.batch.running.get(told.key)
        assert self.foresight is not None
        if seat is not None and not seat.offer.sampling.ignore_eos:
            seat.foretold = True
            self.batch.foreseen(seat, self.foresight.foretold(seat.offer.rid, told, seat.offer.sampling))

    # ------------------------------------------------------------ running

    def admit(self, most: int) -> list[Action]:
        """Let landed seats into a batch of up to `most`."""
        actions: list[Action] = []
        for seat in self.batch.admit(most):
            actions += [AdmitLeg(seat.key, seat.tokens[0]), self._stage(seat, Stage.DECODE)]
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
            seat = self.bare.pop(key)
            seat.allocated = True
            actions += [self.landing.take(chunk, seat) for chunk in seat.flow.announced.values()]
        items, ended = self.batch.step_done(spans, tokens, preempted, steps)
        for seat, end in ended:
            self._finish(seat, end)
        return [self._tell(Tokens, items=items), *actions] if items else actions

    def _finish(self, seat: Seat, end: End) -> None:
        self._leave(seat)
        if self.foresight is not None and not seat.offer.sampling.ignore_eos:
            self.foresight.ended(seat.offer.rid, seat.written, end.reason)
        seat.end = end

    # ------------------------------------------------------------ what it says of itself

    def resend(self, message: Resend) -> list[Action]:
        """All that is known, also what would be told later."""
        seat = self._seat_of(message.rid)
        if seat is None or seat.offer.attempt != message.attempt:
            return []
        ids = seat.outputs()[message.start :]
        item = TokenItem(seat.offer.rid, seat.offer.attempt, message.start, ids, seat.end)
        if seat.running:
            self.batch.told(seat)
        return [self._tell(Tokens, items=[item])] if ids or seat.end else []

    def holds(self) -> list[Hold]:
        """`outputs` are those that the broker was told of: it asks for what it then lacks, and for no more."""
        return [
            Hold(seat.offer.rid, seat.offer.attempt, seat.stage, len(seat.offer.output) + seat.sent)
            for seat in self.seats.values()
        ]

    def waiting(self) -> int:
        return len(self.moving) + len(self.batch.landed)

    def _seat_of(self, rid: str) -> Seat | None:
        return self.seats[self._keys[rid]] if rid in self._keys else None

    def _stage(self, seat: Seat, stage: Stage) -> Send:
        return self._tell(Staged, rid=seat.offer.rid, attempt=seat.offer.attempt, stage=stage, peer=seat.offer.src)

    def _tell(self, kind: type[Staged] | type[Tokens], **fields: Any) -> Send:
        return Send(BROKER, kind(iid=self.own.iid, incarnation=self.own.incarnation, **fields))

    def _answer(self, kind: type[Answer], to: Offer | Chunk, **fields: Any) -> Send:
        who: dict[str, Any] = {"src": self.own.iid, "incarnation": self.own.incarnation}
        return Send(to.src, kind(**who, rid=to.rid, attempt=to.attempt, offer=to.offer, **fields))

    def check(self) -> None:
        """Count everything again."""
        if {seat.offer.rid: key for key, seat in self.seats.items()} != self._keys:
            raise Broken(f"seats and their index differ: {self._keys}")
        here = [seat for seat in self.seats.values() if seat.end is None]
        for seat in here:
            if seat.key not in self.ledger:
                raise Broken(f"{seat.key} has no account")
            places = [place for place in (self.moving, self.batch.landed, self.batch.running) if seat.key in place]
            right = self.batch.running if seat.running else self.batch.landed if seat.landed_as else self.moving
            if places != [right] or (seat.key in self.bare) == seat.allocated:
                raise Broken(f"{seat.key} is not where a seat in {seat.stage} is")
        if len(here) != len(self.moving) + len(self.batch.landed) + len(self.batch.running):
            raise Broken("seats that are no more are still counted")
        self.landing.check(self.moving.values())
        self.batch.check()
        self.outlook.check(here)
