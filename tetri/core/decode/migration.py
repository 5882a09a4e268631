"""Decode migration: a decode that runs here goes on at another instance, with the KV that it has.

Who decides. The broker sends Migrate(rid, attempt, to, next), by the policy of `policy/migrate.py`. Under `next`, a
number of an attempt that nobody has yet, the destination has the request; so all that it reports, and all that is sent
to it, is told from what the source has. While nobody has that attempt, the source holds the request, as ever.

How. The source offers the request as a prefill instance does (Offer, with a receipt), and exports nothing before the
Grant: so its slots always come back (core/prefill/kv_send.py). It goes on decoding, and between two steps it exports
the blocks that are full: nothing changes them any more. When all of them have landed it *stops*: it takes the request
out of the batch, sends the broker the last tokens, and exports the blocks since then, the last of which is not full.
With them go all its output tokens of this attempt. The destination reserved blocks for `ahead` tokens more than there
were, so that it can land everything, and then runs the request at once: it has the memory for it.

Who has it. The first report of the destination that all has landed makes it the holder: the broker takes `next` as the
attempt, and closes the earlier one at the source. A source that has not stopped may give the migration up at any time,
with a Drop, and goes on: the request may have ended, been cancelled or preempted, the destination may defer or refuse,
or be lost. A source that has stopped never goes on by itself, because the destination may have everything: it asks the
broker (NotMigrated, repeated with each heartbeat). Either the broker knows of the destination, and closes the request
here; or it voids `next` first, so that nothing of the destination counts any more, and then answers with a Migrate back
here. So no two instances ever write tokens of one attempt, and the tokens of each go on from those before: the
destination has all of them, and the broker asks it for those that it has missed.

A Migrate that is lost is sent again with the heartbeats, until the broker hears what became of it. One that comes late
or twice changes nothing: `next` only grows, and what was voided once stays so (`DecodeRequest.void`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from tetri.core.actions import Action, Broken, Export, Exported, Free, HoldRequest, Send
from tetri.core.decode.batch import Batch
from tetri.core.decode.request import DecodeRequest
from tetri.core.instance.activity import ActivityLog
from tetri.core.instance.identity import Identity
from tetri.core.instance.peers import Peers
from tetri.policy.migrate import AHEAD
from tetri.request import blocks_for, token_ids
from tetri.wire.handover import BetweenWorkers, Chunk, Defer, Drop, Grant, Landed, Offer, Refuse
from tetri.wire.messages import Migrate, NotMigrated, Tokens

FEW_BLOCKS = 1  # it stops when no more full blocks than these are left to export


class Slab(Protocol):
    """The slots of the worker's slab, which its prefill phase counts."""

    def free(self) -> int:
        """How many are free."""

    def use(self, slots: int) -> None:
        """Count so many as used."""


@dataclass(slots=True, eq=False)
class Migration:
    """A request on its way to the instance `to`, where it is attempt `attempt`, by offer `offer`. `limit`: tokens whose
    KV the destination can take. `since`: when the offer or a chunk was last sent."""

    request: DecodeRequest
    to: str
    attempt: int
    offer: Offer
    limit: int
    since: float
    granted: bool = False
    stopped: bool = False  # it is out of the batch, and only the broker can bring it back
    why: str = ""  # of a stopped one: why it has to come back; the broker is asked
    exported: int = 0  # blocks
    exports: dict[int, tuple[int, int]] = field(default_factory=dict)  # under way: index -> blocks [start, stop)
    chunks: int = 0
    in_flight: dict[int, Chunk] = field(default_factory=dict)  # announced and not landed, by index
    sent: list[Chunk] = field(default_factory=list)  # all that were announced, landed ones included

    @property
    def kept(self) -> int:
        """Slots that its KV takes."""
        here = sum(stop - start for start, stop in self.exports.values())
        return here + sum(chunk.stop - chunk.start for chunk in self.in_flight.values())


class Migrations:
    """The migrations from this instance, by the key of the request here. Shares the decode scheduler's batch."""

    def __init__(self, own: Identity, peers: Peers, batch: Batch, activity: ActivityLog) -> None:
        self.own, self.peers, self.batch, self.activity = own, peers, batch, activity
        self.by_key: dict[str, Migration] = {}
        self._number = 0

    # ------------------------------------------------------------ what the broker asks for

    def migrate(self, message: Migrate, request: DecodeRequest | None, now: float) -> list[Action]:
        """Begin to hand a request over, or go on with it here. `request`: the attempt that the message names, if it is
        here."""
        if request is None:
            return []
        if message.next <= request.void:
            known = message.to == self.own.iid
            return [] if known else [self._not_migrated(request, message.next, "it was given up before")]
        current = self.by_key.get(request.key)
        if message.to == self.own.iid:
            request.void = message.next
            return self._end(current, "the broker keeps it here") if current is not None else []
        actions: list[Action] = []
        if current is not None:
            if message.next <= current.attempt:
                return []
            actions = self._end(current, "it goes to another instance")  # the broker has voided the attempt before
        why = self._obstacle(message.to, request)
        if why is not None:
            return [*actions, self._not_migrated(request, message.next, why)]
        return [*actions, self._begin(message, request, now)]

    def _obstacle(self, to: str, request: DecodeRequest) -> str | None:
        if not request.running or request.alone or request.key in self.batch.preempted:
            return "it does not run"
        if to not in self.peers.up:
            return f"{self.own.iid} has no connection to {to}"
        return "it is about to end" if self._ahead(request) < 1 else None

    @staticmethod
    def _ahead(request: DecodeRequest) -> int:
        """How many tokens it may write until it stops: then at least one must be left for the destination."""
        return min(AHEAD, request.offer.sampling.max_tokens - request.written - 1)

    def _begin(self, message: Migrate, request: DecodeRequest, now: float) -> Action:
        self._number += 1
        mine, ahead = request.offer, self._ahead(request)
        limit = request.size - 1 + ahead
        offer = Offer(
            **self.own.address(mine.rid, message.next, self._number),
            fingerprint=self.own.instance.fingerprint,
            prompt=mine.prompt,
            output=mine.output,
            sampling=mine.sampling,
            blocks=blocks_for(limit, self.own.capacity.block_tokens),
            length=request.length,
            tpot_s=mine.tpot_s,
            receipt=request.receipt(self.own.iid),
            written=token_ids(request.tokens[:-1]),
            ahead=ahead,
            decoded_s=now - request.first_at,
        )
        self.by_key[request.key] = Migration(request, message.to, message.next, offer, limit, now)
        self.activity.happened("offered", mine, message.to)
        return Send(message.to, offer)

    # ------------------------------------------------------------ between two steps

    def step(self, slab: Slab) -> list[Action]:
        """Export what is full, and stop the requests of which nearly all has landed. Forget those whose requests have
        ended. Call it between two steps of the engine, before the next one is planned. It exports no more blocks than a
        chunk has, so that the batch does not wait for long."""
        actions: list[Action] = []
        if not self.by_key:
            return actions
        left = min(slab.free(), blocks_for(self.own.capacity.chunk_tokens, self.own.capacity.block_tokens))
        for migration in [*self.by_key.values()]:
            if not migration.stopped and not self._runs(migration.request):
                actions += self._forget(migration, "it does not run any more")
            elif migration.stopped and self.batch.stopped.get(migration.request.key) is not migration.request:
                actions += self._forget(migration, "it has ended")
            elif not migration.stopped:
                more = self._export(migration, left)
                actions += more
                exported = sum(action.stop - action.start for action in more if isinstance(action, Export))
                slab.use(exported)
                left -= exported
        return actions

    def _runs(self, request: DecodeRequest) -> bool:
        running = self.batch.running.get(request.key) is request
        return running and request.key not in self.batch.preempted

    def _export(self, migration: Migration, slots: int) -> list[Action]:
        request, size = migration.request, self.own.capacity.block_tokens
        filled = request.size - 1  # the last token has no KV yet
        full, every = (filled - 1) // size, blocks_for(filled, size)  # of the last one goes nothing before it stops
        at_end = filled >= migration.limit
        if not migration.granted:
            return self._end(migration, f"{migration.to} has not answered in time") if at_end else []
        moving = bool(migration.in_flight or migration.exports)
        stops = at_end or (not moving and full - migration.exported <= FEW_BLOCKS)
        if stops and every - migration.exported <= slots:
            return self._stop(migration, every)
        if at_end:
            return self._end(migration, "its KV has not moved in time")
        stop = min(full, migration.exported + slots)
        return [self._chunk(migration, stop)] if stop > migration.exported else []

    def _stop(self, migration: Migration, every: int) -> list[Action]:
        """Take the request out of the batch, and export what is left of its KV."""
        request, actions = migration.request, list[Action]()
        migration.stopped = True
        if len(request.tokens) > request.sent:
            item = self.batch.token_item(request)
            actions.append(self.own.report(Tokens, items=[item], step=self.activity.step))
        self.batch.stop(request)
        return [*actions, HoldRequest(request.key, True), self._chunk(migration, every)]

    def _chunk(self, migration: Migration, stop: int) -> Export:
        start, index = migration.exported, migration.chunks
        migration.exports[index] = (start, stop)
        migration.exported, migration.chunks = stop, index + 1
        return Export(migration.request.key, index, start, stop)

    def exported(self, event: Exported, now: float) -> list[Action]:
        """Announce a chunk that is in the slab now. Free it if nobody wants it any more."""
        migration = self.by_key.get(event.key)
        if migration is None or migration.exports.pop(event.index, None) != (event.start, event.stop):
            return [Free(event.handle)]
        last = migration.stopped and not migration.exports
        chunk = Chunk(
            **self._address(migration),
            index=event.index,
            start=event.start,
            stop=event.stop,
            handle=event.handle,
            digest=event.digest,
            written=[*migration.request.tokens] if last else [],
        )
        migration.in_flight[event.index] = chunk
        migration.since = now
        migration.sent.append(chunk)
        return [Send(migration.to, chunk)]

    # ------------------------------------------------------------ what the destination answers

    def of(self, answer: BetweenWorkers) -> Migration | None:
        """Return the migration that an answer is about."""
        if not self.by_key:
            return None
        found = (each for each in self.by_key.values() if each.to == answer.src)
        about = (answer.rid, answer.attempt, answer.offer)
        return next((each for each in found if about == (each.offer.rid, each.attempt, each.offer.offer)), None)

    def answered(self, migration: Migration, answer: Grant | Defer | Refuse | Landed) -> list[Action]:
        """Handle an answer of the destination."""
        match answer:
            case Landed():
                chunk = migration.in_flight.pop(answer.index, None)
                return [] if chunk is None else [Free(chunk.handle)]
            case Grant():
                migration.granted = True
                return []
            case Defer():
                return [] if migration.granted else self._end(migration, f"{migration.to} has no memory now")
        return self._unwanted(migration, f"{migration.to} refuses: {answer.why}")

    def lost(self, iid: str) -> list[Action]:
        """Handle the loss of an instance, or of the connection to it."""
        gone = [migration for migration in self.by_key.values() if migration.to == iid]
        return [action for migration in gone for action in self._unwanted(migration, f"{iid} was lost")]

    def _unwanted(self, migration: Migration, why: str) -> list[Action]:
        """Go on here, at once or when the broker says so."""
        if not migration.stopped:
            return self._end(migration, why, drop=False)
        migration.why = why
        return [self._asks(migration)]

    def _asks(self, migration: Migration) -> Send:
        return self._not_migrated(migration.request, migration.attempt, migration.why, held=True)

    # ------------------------------------------------------------ time

    def repeat(self, now: float) -> list[Action]:
        """Send again, with the heartbeat, what nobody has answered for `offer_s`: the offer, and the chunks. Those of a
        request that has stopped are all sent, landed ones too: a destination that has lost some of it finds that they
        are no longer there, and refuses."""
        actions: list[Action] = []
        for migration in self.by_key.values():
            if migration.why:
                actions.append(self._asks(migration))
            elif now - migration.since >= self.own.offer_s:
                migration.since = now
                again = migration.sent if migration.stopped else migration.in_flight.values()
                messages: Iterable[Chunk | Offer] = again if migration.granted else [migration.offer]
                actions += [Send(migration.to, message) for message in messages]
        return actions

    # ------------------------------------------------------------ ends

    def _end(self, migration: Migration, why: str, *, drop: bool = True) -> list[Action]:
        """Go on with the request here, in the batch, and say so to the broker unless it knows."""
        request = migration.request
        actions = self._forget(migration, why, drop=drop)
        if migration.stopped:
            self.batch.go_on(request)
            actions.append(HoldRequest(request.key, False))
        elif request.void < migration.attempt:
            actions.append(self._not_migrated(request, migration.attempt, why))
        request.void = max(request.void, migration.attempt)
        return actions

    def _forget(self, migration: Migration, why: str, *, drop: bool = True) -> list[Action]:
        """Free the slots, and withdraw the offer: a destination that has everything ignores that."""
        del self.by_key[migration.request.key]
        actions: list[Action] = [Free(chunk.handle) for chunk in migration.in_flight.values()]
        if drop:
            actions.append(Send(migration.to, Drop(**self._address(migration), why=why)))
        return actions

    def _address(self, migration: Migration) -> dict[str, Any]:
        offer = migration.offer
        return self.own.address(offer.rid, offer.attempt, offer.offer)

    def _not_migrated(self, request: DecodeRequest, attempt: int, why: str, *, held: bool = False) -> Send:
        rid, mine = request.offer.rid, request.offer.attempt
        return self.own.report(NotMigrated, rid=rid, attempt=mine, next=attempt, why=why, held=held)

    def check(self) -> None:
        """Raise Broken when a request has stopped that goes nowhere, or a migration counts blocks wrongly."""
        stopped = {key for key, each in self.by_key.items() if each.stopped}
        if not self.batch.stopped.keys() <= stopped:
            raise Broken(f"stopped are {list(self.batch.stopped)}, on their way elsewhere {stopped}")
        for key, each in self.by_key.items():
            if each.kept > each.exported or each.exported and not each.granted:
                raise Broken(f"{key} keeps {each.kept} of {each.exported} exported blocks, granted: {each.granted}")
