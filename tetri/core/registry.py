"""The instances as the broker knows them: who is there, since when silent, and the view that it publishes."""

from __future__ import annotations

from dataclasses import dataclass

from tetri.core.actions import Action, Connect, Disconnect, Send
from tetri.request import Capacity, Fingerprint, blocks_for, difference
from tetri.wire.clients import InstanceStatus
from tetri.wire.messages import Roster, FromWorker, InstanceEntry, Load, Ready

FORGET_S = 600.0  # a lost worker stays in the status for so long
SILENCE_S = 0.8  # a worker that hears no view for `view_s`, 2 s, registers again


@dataclass(slots=True)
class Peer:
    """One worker. `lost` says why it is out, None while it is in."""

    iid: str
    incarnation: int
    role: str
    inbox: str
    fingerprint: Fingerprint
    capacity: Capacity
    load: Load
    seen: float
    held: int = 0
    suspect: bool = False  # silent for longer than allowed, as far as was heard
    lost: str | None = None


class Registry:
    """`peers` by iid, the lost ones included. `up`: to which of them a connection stands."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.peers: dict[str, Peer] = {}
        self.up: dict[str, None] = {}
        self.number = 0
        self._sent: list[InstanceEntry] = []
        self._sent_at = 0.0

    def ready(self, message: Ready, now: float) -> tuple[list[Action], bool]:
        """Enter a worker. True when it replaces another incarnation, whose requests are lost."""
        old = self.peers.get(message.iid)
        self.peers[message.iid] = Peer(
            message.iid,
            message.incarnation,
            message.role,
            message.inbox,
            message.fingerprint,
            message.capacity,
            message.load,
            now,
        )
        replaced = old is not None and old.incarnation != message.incarnation
        return [Connect(message.iid, message.inbox)], replaced

    def known(self, message: FromWorker) -> Peer | None:
        """The peer that sent this, if this incarnation of it has registered."""
        peer = self.peers.get(message.iid)
        return peer if peer is not None and peer.incarnation == message.incarnation else None

    def usable(self, role: str) -> list[Peer]:
        return [p for p in self.peers.values() if p.role == role and p.lost is None and p.iid in self.up]

    def prefillers(self, tokens: int) -> list[Peer]:
        """Prefill instances that hold so many tokens and can hand their KV to somebody: to a decode instance that
        is there or, while none is, to whoever comes."""
        decoders = [peer.fingerprint for peer in self.peers.values() if peer.role == "decode" and peer.lost is None]
        return [
            peer
            for peer in self.usable("prefill")
            if blocks_for(tokens, peer.capacity.block_tokens) <= peer.capacity.blocks
            and tokens < peer.capacity.context
            and (not decoders or peer.fingerprint in decoders)
        ]

    def publish(self, now: float) -> list[Action]:
        """The next Roster, to everyone that can be reached."""
        self.number += 1
        self._sent, self._sent_at = self._instances(), now
        view = Roster(epoch=self.epoch, number=self.number, instances=self._sent)
        return [Send(iid, view) for iid in self.up]

    def prune(self, now: float) -> list[Action]:
        """Give up the connections to workers that have been lost for long: they may never come back."""
        gone = [p.iid for p in self.peers.values() if p.lost is not None and now - p.seen > FORGET_S]
        for iid in gone:
            del self.peers[iid]
        return [Disconnect(iid) for iid in gone]

    def refresh(self, now: float) -> list[Action]:
        """A Roster when there is news, and now and then when there is none, so that silence means trouble."""
        news = self._instances() != self._sent or now - self._sent_at >= SILENCE_S
        return self.publish(now) if news else []

    def _instances(self) -> list[InstanceEntry]:
        return [
            InstanceEntry(
                iid=peer.iid,
                incarnation=peer.incarnation,
                role=peer.role,
                inbox=peer.inbox,
                fingerprint=peer.fingerprint,
                capacity=peer.capacity,
            )
            for peer in self.peers.values()
            if peer.lost is None
        ]

    def too_long(self, prompt: int, total: int) -> str | None:
        """Why a request of so many tokens fits into no instance that is there; None when one may take it."""
        for role, tokens in (("prefill", prompt), ("decode", total)):
            rooms = [p.capacity for p in self.peers.values() if p.role == role and p.lost is None]
            if rooms and all(blocks_for(tokens, room.block_tokens) > room.blocks for room in rooms):
                most = max(room.blocks * room.block_tokens for room in rooms)
                return f"{tokens} tokens fit into no {role} instance: the largest holds {most}"
        return None

    def status(self) -> list[InstanceStatus]:
        return [
            InstanceStatus(
                iid=peer.iid,
                role=peer.role,
                state="ready" if peer.lost is None and peer.iid in self.up else "lost",
                incarnation=peer.incarnation,
                blocks=peer.capacity.blocks,
                free_blocks=peer.load.free_blocks,
                queued=peer.load.queued,
                running=peer.load.running,
                held=peer.held,
                note=peer.lost or self._stranger(peer),
            )
            for peer in sorted(self.peers.values(), key=lambda peer: peer.iid)
        ]

    def _stranger(self, peer: Peer) -> str:
        """Why KV can never move between this worker and one of the other role; empty when it can."""
        others = [p for p in self.peers.values() if p.lost is None and p.role != peer.role]
        for other in others:
            why = difference(peer.fingerprint, other.fingerprint)
            if why is not None:
                return f"never paired with {other.iid}: {why}"
        return ""
