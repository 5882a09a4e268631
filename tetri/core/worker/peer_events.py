"""What a worker does when other instances come, go or answer its offers, and when a request is over."""

from __future__ import annotations

from tetri.core.actions import Action
from tetri.core.decode.scheduler import Decode
from tetri.core.instance.peers import Peers
from tetri.core.prefill.dispatcher import Dispatcher
from tetri.core.prefill.scheduler import Prefill
from tetri.wire.handover import Chunk, Drop, Grant, Landed, LengthUpdate, Offer, Refuse
from tetri.wire.messages import Close, Membership

MOST_EARLY = 256


class PeerEvents:
    """Works on the worker's own parts."""

    def __init__(self, peers: Peers, dispatcher: Dispatcher, prefill: Prefill, decode: Decode) -> None:
        self.peers, self.dispatcher, self.prefill, self.decode = peers, dispatcher, prefill, decode
        self._early: list[Offer | LengthUpdate | Chunk | Drop] = []

    def early(self, message: Offer | LengthUpdate | Chunk | Drop) -> bool:
        """Whether no roster has told of this start of its sender yet. No answer would reach it, and it would ask again
        only in a second: what it says is heard with the next roster. Of too many, the oldest are forgotten."""
        if self.peers.knows(message.src, message.incarnation):
            return False
        self._early.append(message)
        del self._early[:-MOST_EARLY]
        return True

    def introduced(self) -> list[Offer | LengthUpdate | Chunk | Drop]:
        """After a roster: what those said of whom it tells. The others have their chance at the next one."""
        early, self._early = self._early, []
        known = [self.peers.knows(message.src, message.incarnation) for message in early]
        self._early = [message for message, is_known in zip(early, known, strict=True) if not is_known]
        return [message for message, is_known in zip(early, known, strict=True) if is_known]

    def answered(self, event: Grant | Refuse | Landed, now: float) -> list[Action]:
        request = self.dispatcher.request_of(event)
        if request is None:  # of an offer that was taken back, which may not be known there
            return [self.dispatcher.renounce(event)] if isinstance(event, Grant) else []
        if isinstance(event, Refuse):
            if event.corrupt or not request.flow.movable:
                return self.prefill.give_up(request, f"{event.src} cannot go on with the KV: {event.why}")
            self.dispatcher.refused(request, event.why)
            return self.dispatcher.dispatch(now)
        self.dispatcher.granted(request, now)  # or nothing could have landed
        return self.prefill.kv_send.landed(request, event.index) if isinstance(event, Landed) else []

    def closed(self, message: Close) -> list[Action]:
        self.prefill.lengths.closed(message)
        rid, attempt = message.rid, message.attempt
        return [*self.prefill.close(rid, attempt), *self.decode.close(rid, attempt)]

    def membership(self, membership: Membership, now: float) -> list[Action]:
        actions, gone = self.peers.update(membership)
        self.peers.expire(now)
        for iid in gone:
            actions += self._lost(iid, now)
        return [*actions, *self.dispatcher.allow_retry(now)]

    def up(self, peer: str, now: float) -> list[Action]:
        self.peers.connected(peer)
        again = [
            action for request in self.dispatcher.aimed_at(peer) for action in self.dispatcher.repeat(request, now)
        ]
        return [*again, *self.decode.repeat(peer), *self.dispatcher.dispatch(now)]

    def down(self, peer: str, now: float) -> list[Action]:
        self.peers.disconnected(peer)
        return self._lost(peer, now)

    def _lost(self, iid: str, now: float) -> list[Action]:
        actions = self.decode.orphaned(iid)
        for request in self.dispatcher.aimed_at(iid):
            if request.flow.movable:
                self.dispatcher.refused(request, "lost")
            else:
                actions += self.prefill.give_up(request, f"{iid} was lost with part of the KV")
        return [*actions, *self.dispatcher.dispatch(now)]
