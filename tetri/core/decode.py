"""The decode half of a worker: offer -> reserve -> chunks land -> wait -> admit -> one token a step.

A seat is kept, with its tokens, until the broker closes it: until then the broker can ask for them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tetri.core.actions import BROKER, Action, AddLeg, AdmitLeg, Adopt, Adopted, Broken, CancelLeg, Forget, Send
from tetri.core.kvflow import Inflow
from tetri.core.ledger import Ledger
from tetri.core.peers import Identity
from tetri.core.seat import Seat, obstacle
from tetri.leg import Leg, Sampled, Span
from tetri.policy.rules import ADMISSIONS
from tetri.policy.views import BatchView, WaitingSeat
from tetri.request import Stage, blocks_for
from tetri.wire.messages import (
    Chunk,
    Drop,
    Finished,
    Grant,
    Hold,
    Landed,
    Offer,
    Refuse,
    Resend,
    Staged,
    TokenItem,
    Tokens,
    WorkerEvent,
)

ADOPT_TRIES = 3  # a chunk whose digest does not match is copied again so often, then the offer is refused


Answer = Grant | Refuse | Landed


class Decode:
    """`seats` by key, at most one per request."""

    def __init__(self, own: Identity, ledger: Ledger) -> None:
        self.own, self.ledger = own, ledger
        self.seats: dict[str, Seat] = {}
        self._keys: dict[str, str] = {}  # rid -> key
        self._segments: dict[str, dict[str, None]] = {}  # prefill instance -> its stores, as chunks named them
        self._landings = 0
        self._stuck = False  # the last step ran none of the batch: all are preempted, and wait for memory

    # ------------------------------------------------------------ the hand-over

    def offer(self, message: Offer) -> list[Action]:
        seat = self._seat_of(message.rid)
        if seat is not None and seat.offer.attempt > message.attempt:
            return [self._answer(Refuse, message, why="a later attempt is here")]
        if seat is not None and seat.is_for(message):
            return [self._answer(Grant, message)]
        if seat is not None and seat.has_all_of(message):
            seat.offer = message  # the same under another number
            return [self._answer(Grant, message)]
        actions = self._release(seat) if seat else []
        why = obstacle(message, self.own.fingerprint, self.own.capacity)
        if why is not None:
            return [*actions, self._answer(Refuse, message, why=why)]
        key = f"d:{message.rid}:{message.attempt}:{message.src}:{message.offer}"
        why = self.ledger.reserve(key, message.blocks)
        if why is not None:
            return [*actions, self._answer(Refuse, message, why=why)]
        self.seats[key] = Seat(key, message, Inflow(message.blocks))
        self._keys[message.rid] = key
        tokens = (*message.prompt, *message.output)
        leg = Leg(key, "decode", tokens, len(message.prompt), message.sampling)
        return [*actions, AddLeg(leg), self._answer(Grant, message)]

    def chunk(self, message: Chunk) -> list[Action]:
        seat = self._seat_of(message.rid)
        if seat is None or not seat.is_for(message):
            return [self._answer(Refuse, message, why="no such offer here")]
        if message.index in seat.flow.landed or seat.landed_as:
            return [self._answer(Landed, message, index=message.index)]
        if not seat.flow.fits(message):
            return [self._answer(Refuse, message, why="the chunk does not fit its offer"), *self._release(seat)]
        new = seat.flow.announce(message)
        return [self._adopt(seat, message)] if new and seat.allocated else []

    def _adopt(self, seat: Seat, chunk: Chunk) -> Action:
        self._segments.setdefault(chunk.src, {})[chunk.handle.segment] = None
        seat.flow.taking += 1
        return Adopt(seat.key, chunk.index, chunk.start, chunk.handle, chunk.digest)

    def adopted(self, event: Adopted) -> list[Action]:
        seat = self.seats.get(event.key)
        if seat is None:
            return []
        flow = seat.flow
        flow.taking -= 1
        if event.problem == "corrupt" and flow.broken is None and flow.again(event.index, ADOPT_TRIES):
            return [self._adopt(seat, flow.announced[event.index])]
        if event.problem is not None:
            flow.broken = flow.broken or f"chunk {event.index} is {event.problem}"
        if flow.broken is not None:  # the engine must know the leg until the last copy is made
            refuse = self._answer(Refuse, seat.offer, why=flow.broken, spoilt=True)
            return [] if flow.taking else [refuse, *self._release(seat)]
        seat.flow.land(event.index)
        actions: list[Action] = [self._answer(Landed, seat.offer, index=event.index)]
        if seat.flow.complete:
            self._landings += 1
            seat.landed_as = self._landings
            assert seat.flow.token is not None
            seat.tokens.append(seat.flow.token)
            actions.append(self._stage(seat, Stage.WAITING))
        return actions

    def drop(self, message: Drop) -> list[Action]:
        seat = self._seat_of(message.rid)
        if seat is None or not seat.is_for(message) or seat.landed_as:
            return []
        return self._release(seat)

    def reject(self, key: str, why: str) -> list[Action]:
        """The engine cannot run this leg."""
        seat = self.seats[key]
        return [self._answer(Refuse, seat.offer, why=why), *self._release(seat, in_engine=False)]

    def orphaned(self, src: str) -> list[Action]:
        """A prefill instance is gone: what it had not sent completely never comes."""
        seats = [seat for seat in self.seats.values() if seat.offer.src == src and not seat.landed_as]
        forget = [Forget(segment) for segment in self._segments.pop(src, {})]
        return [*(action for seat in seats for action in self._release(seat)), *forget]

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
        return [self._answer(Grant, seat.offer) for seat in self.seats.values() if not seat.landed_as]

    def close(self, rid: str, attempt: int) -> list[Action]:
        seat = self._seat_of(rid)
        return self._release(seat) if seat is not None and seat.offer.attempt <= attempt else []

    def _release(self, seat: Seat, *, in_engine: bool = True) -> list[Action]:
        del self.seats[seat.key], self._keys[seat.offer.rid]
        self.ledger.close(seat.key)
        return [CancelLeg(seat.key)] if in_engine and seat.end is None else []

    # ------------------------------------------------------------ running

    def admit(self) -> list[Action]:
        """Let landed seats into the batch. If nothing runs, the oldest goes whatever the policy says: the engine
        can take the memory of those in the batch for another, but not of those that wait."""
        waiting = self._landed()
        if not waiting:
            return []
        running = self.running()
        views = [WaitingSeat(seat.key, seat.landed_as, seat.flow.blocks) for seat in waiting]
        batch = BatchView(running, self.own.capacity.max_batch, self.ledger.free)
        keys = ADMISSIONS[self.own.rules.admit](views, batch)
        if not keys and (running == 0 or self._stuck):
            keys = [min(waiting, key=lambda seat: seat.landed_as).key]
        return [action for key in keys for action in self._admit(self.seats[key])]

    def _landed(self) -> list[Seat]:
        return [s for s in self.seats.values() if s.landed_as and not s.running and not s.end]

    def stuck(self) -> bool:
        """Whether nothing runs until another seat is admitted."""
        return self._stuck and bool(self._landed())

    def _admit(self, seat: Seat) -> list[Action]:
        seat.running = True
        self.ledger.run(seat.key)
        self._grow(seat)
        return [AdmitLeg(seat.key, seat.tokens[0]), self._stage(seat, Stage.DECODE)]

    def _grow(self, seat: Seat) -> None:
        self.ledger.grow(seat.key, blocks_for(seat.length, self.own.capacity.block_tokens))

    def running(self) -> int:
        return sum(seat.running for seat in self.seats.values())

    def steps(self) -> bool:
        """Whether the engine has something to do: a token to compute, or blocks to allocate."""
        return any(seat.running or not seat.allocated for seat in self.seats.values())

    def step_done(
        self,
        spans: Sequence[Span],
        tokens: Sequence[Sampled],
        allocated: Sequence[str],
        preempted: Sequence[str],
    ) -> list[Action]:
        actions: list[Action] = []
        self._stuck = not spans and self.running() > 0
        for key in allocated:
            seat = self.seats[key]
            seat.allocated = True
            actions += [self._adopt(seat, chunk) for chunk in seat.flow.announced.values()]
        for span in spans:
            seat = self.seats[span.key]
            seat.recomputed += max(min(span.stop, len(seat.offer.prompt)) - span.start, 0)
        for key in preempted:
            self.seats[key].preempted += 1
        return [*self._take_tokens(tokens), *actions]

    def _take_tokens(self, tokens: Sequence[Sampled]) -> list[Action]:
        items: list[TokenItem] = []
        after: list[Action] = []
        for sampled in tokens:
            seat = self.seats[sampled.key]
            if not seat.running:
                raise Broken(f"a token for {seat.key}, which was not admitted")
            start = len(seat.offer.output) + len(seat.tokens)
            items.append(self._item(seat, start, list(sampled.ids), sampled.reason))
            seat.tokens += sampled.ids
            if sampled.reason is None:
                self._grow(seat)
            else:
                after.append(self._finish(seat, sampled.reason))
        return [self._tell(Tokens, items=items), *after] if items else []

    def _finish(self, seat: Seat, reason: str) -> Action:
        seat.running = False
        self.ledger.close(seat.key)
        seat.end = Finished(
            iid=self.own.iid,
            incarnation=self.own.incarnation,
            rid=seat.offer.rid,
            attempt=seat.offer.attempt,
            reason=reason,
            outputs=len(seat.outputs()),
            receipt=seat.receipt(self.own.iid, self.own.transport),
        )
        return Send(BROKER, seat.end)

    # ------------------------------------------------------------ what it says of itself

    def resend(self, message: Resend) -> list[Action]:
        seat = self._seat_of(message.rid)
        if seat is None or seat.offer.attempt != message.attempt:
            return []
        ids = seat.outputs()[message.start :]
        item = self._item(seat, message.start, ids, seat.end.reason if seat.end else None)
        tokens = [self._tell(Tokens, items=[item])] if ids else []
        return [*tokens, *([Send(BROKER, seat.end)] if seat.end else [])]

    def holds(self) -> list[Hold]:
        return [
            Hold(seat.offer.rid, seat.offer.attempt, seat.stage, len(seat.outputs())) for seat in self.seats.values()
        ]

    def waiting(self) -> int:
        return sum(not seat.running and not seat.end for seat in self.seats.values())

    def _seat_of(self, rid: str) -> Seat | None:
        return self.seats[self._keys[rid]] if rid in self._keys else None

    def _item(self, seat: Seat, start: int, ids: list[int], reason: str | None) -> TokenItem:
        return TokenItem(seat.offer.rid, seat.offer.attempt, start, ids, reason)

    def _stage(self, seat: Seat, stage: Stage) -> Send:
        return self._tell(Staged, rid=seat.offer.rid, attempt=seat.offer.attempt, stage=stage, peer=seat.offer.src)

    def _tell(self, kind: type[WorkerEvent], **fields: Any) -> Send:
        return Send(BROKER, kind(iid=self.own.iid, incarnation=self.own.incarnation, **fields))

    def _answer(self, kind: type[Answer], to: Offer | Chunk, **fields: Any) -> Send:
        who: dict[str, Any] = {"src": self.own.iid, "incarnation": self.own.incarnation}
        return Send(to.src, kind(**who, rid=to.rid, attempt=to.attempt, offer=to.offer, **fields))

    def check(self) -> None:
        if {seat.offer.rid: key for key, seat in self.seats.items()} != self._keys:
            raise Broken(f"seats and their index differ: {self._keys}")
        for seat in self.seats.values():
            if (seat.key in self.ledger) != (seat.end is None):
                raise Broken(f"{seat.key}: its account and its end differ")
            if seat.running and not (seat.landed_as and seat.allocated):
                raise Broken(f"{seat.key} runs without its KV")
            if seat.running and len(seat.outputs()) >= seat.offer.sampling.max_tokens:
                raise Broken(f"{seat.key} runs past max_tokens")
