"""Who else is there: a worker's own identity, and the other instances as it knows them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from tetri.core.actions import Action, Connect, Disconnect
from tetri.policy.rules import Rules
from tetri.request import Capacity, Fingerprint, difference
from tetri.wire.messages import ClusterView, InstanceEntry, Load, Roster


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a worker is and by which rules it works. Times are in seconds; `slots` are the blocks that its own KV
    store holds."""

    iid: str
    incarnation: int
    role: str
    inbox: str
    fingerprint: Fingerprint
    capacity: Capacity
    transport: str
    slots: int
    rules: Rules = Rules()
    sched_batch: int = 16  # prompts ordered together (paper, section 3.3.1: PrefillSchedBatch)
    reserve_share: float = 0.5
    beat_s: float = 0.2
    offer_s: float = 1.0
    patience_s: float = 60.0
    view_s: float = 2.0  # without a view for so long, the worker registers again


@dataclass(slots=True)
class Neighbours:
    """The other instances of the newest Roster, and to which of them a connection stands."""

    own: Identity
    instances: dict[str, InstanceEntry] = field(default_factory=dict)
    up: dict[str, None] = field(default_factory=dict)
    epoch: int = 0
    number: int = -1
    loads: dict[str, Load] = field(default_factory=dict)
    seen: tuple[int, int] = (0, -1)  # epoch and number of the newest ClusterView

    def see(self, view: ClusterView) -> bool:
        """Take the loads over; False for an older view of the same monitor."""
        if view.epoch == self.seen[0] and view.number <= self.seen[1]:
            return False
        self.seen = (view.epoch, view.number)
        self.loads = {each.iid: each.load for each in view.loads}
        return True

    def free_blocks(self, instance: InstanceEntry) -> int:
        """As last reported; all of them while nothing was: its Refuse corrects that."""
        load = self.loads.get(instance.iid)
        return instance.capacity.blocks if load is None else load.free_blocks

    def update(self, roster: Roster) -> tuple[list[Action], list[str]]:
        """Take a roster over. Returns the connections to change, and the instances that are gone: left out of it, or
        restarted under another incarnation. An older roster of the same broker is ignored."""
        if roster.epoch == self.epoch and roster.number <= self.number:
            return [], []
        self.epoch, self.number = roster.epoch, roster.number
        old, self.instances = self.instances, {i.iid: i for i in roster.instances if i.iid != self.own.iid}
        gone = [iid for iid, was in old.items() if self._incarnation(iid) != was.incarnation]
        actions: list[Action] = [Disconnect(iid) for iid in gone]
        for iid in gone:
            self.up.pop(iid, None)
        for iid, instance in self.instances.items():
            if iid not in old or iid in gone:
                actions.append(Connect(iid, instance.inbox))
        return actions, gone

    def _incarnation(self, iid: str) -> int | None:
        return self.instances[iid].incarnation if iid in self.instances else None

    def decoders(self) -> Iterator[InstanceEntry]:
        """Reachable decode instances that understand this engine's KV bytes."""
        for iid, instance in self.instances.items():
            reachable = instance.role == "decode" and iid in self.up
            if reachable and difference(self.own.fingerprint, instance.fingerprint) is None:
                yield instance
