"""What a worker does when other instances come, go or answer its offers, and when a request is over."""

from __future__ import annotations

from tetri.core.actions import Action
from tetri.core.decode import Decode
from tetri.core.dispatch import Dispatcher
from tetri.core.peers import Neighbours
from tetri.core.prefill import Prefill
from tetri.wire.handover import Chunk, Drop, Foreseen, Grant, Landed, Offer, Refuse
from tetri.wire.messages import Close, Roster

MOST_EARLY = 256


class Contacts:
    """Works on the worker's own parts."""

    def __init__(self, neighbours: Neighbours, dispatcher: Dispatcher, prefill: Prefill, decode: Decode) -> None:
        self.neighbours, self.dispatcher, self.prefill, self.decode = neighbours, dispatcher, prefill, decode
        self._early: list[Offer | Foreseen | Chunk | Drop] = []

    def early(self, message: Offer | Foreseen | Chunk | Drop) -> bool:
        """Whether no roster has told of this start of its sender yet. No answer would reach it, and it would ask again
        only in a second: what it says is heard with the next roster. Of too many, the oldest are forgotten."""
        if self.neighbours.knows(message.src, message.incarnation):
            return False
        self._early.append(message)
        del self._early[:-MOST_EARLY]
        return True

    def introduced(self) -> list[Offer | Foreseen | Chunk | Drop]:
        """After a roster: what those said of whom it tells. The others have their chance at the next one."""
        early, self._early = self._early, []
        known = [self.neighbours.knows(message.src, message.incarnation) for message in early]
        self._early = [message for message, heard in zip(early, known, strict=True) if not heard]
        return [message for message, heard in zip(early, known, strict=True) if heard]

    def answered(self, event: Grant | Refuse | Landed, now: float) -> list[Action]:
        job = self.dispatcher.job_of(event)
        if job is None:  # of an offer that was taken back, which may not be known there
            return [self.dispatcher.renounce(event)] if isinstance(event, Grant) else []
        if isinstance(event, Refuse):
            if event.spoilt or not job.flow.movable:
                return self.prefill.give_up(job, f"{event.src} cannot go on with the KV: {event.why}")
            self.dispatcher.refused(job, event.why)
            return self.dispatcher.dispatch(now)
        self.dispatcher.granted(job, now)  # or nothing could have landed
        return self.prefill.leaving.landed(job, event.index) if isinstance(event, Landed) else []

    def closed(self, message: Close) -> list[Action]:
        self.prefill.lengths.closed(message)
        rid, attempt = message.rid, message.attempt
        return [*self.prefill.close(rid, attempt), *self.decode.close(rid, attempt)]

    def roster(self, roster: Roster, now: float) -> list[Action]:
        actions, gone = self.neighbours.update(roster)
        self.neighbours.expire(now)
        for iid in gone:
            actions += self._lost(iid, now)
        return [*actions, *self.dispatcher.forgive(now)]

    def up(self, peer: str, now: float) -> list[Action]:
        self.neighbours.connected(peer)
        again = [action for job in self.dispatcher.aimed_at(peer) for action in self.dispatcher.repeat(job, now)]
        return [*again, *self.decode.repeat(peer), *self.dispatcher.dispatch(now)]

    def down(self, peer: str, now: float) -> list[Action]:
        self.neighbours.disconnected(peer)
        return self._lost(peer, now)

    def _lost(self, iid: str, now: float) -> list[Action]:
        actions = self.decode.orphaned(iid)
        for job in self.dispatcher.aimed_at(iid):
            if job.flow.movable:
                self.dispatcher.refused(job, "lost")
            else:
                actions += self.prefill.give_up(job, f"{iid} was lost with part of the KV")
        return [*actions, *self.dispatcher.dispatch(now)]
