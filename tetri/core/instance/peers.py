"""The other instances as a worker knows them."""

from __future__ import annotations

from dataclasses import dataclass, field

from tetri.core.actions import Action, Connect, Disconnect
from tetri.core.instance.identity import Identity
from tetri.instance import Instance
from tetri.policy import pairing
from tetri.request import DECODE_ROLES, PREFILL_ROLES
from tetri.wire.messages import ClusterView, InstanceLoad, Membership


@dataclass(slots=True)
class Peers:
    """The other instances of the newest Membership, their loads of the newest ClusterView, and to whom a connection
    stands. `members` counts up with whatever changes who can be asked to decode, `version` also with what is known of
    their loads."""

    own: Identity
    instances: dict[str, Instance] = field(default_factory=dict)
    up: dict[str, None] = field(default_factory=dict)
    epoch: int = 0
    number: int = -1
    seen: tuple[int, int] = (0, -1)  # epoch and number of the newest ClusterView
    seen_at: float = 0.0
    version: int = 0
    member_version: int = 0
    _view: ClusterView | None = None
    _able: dict[str, Instance] = field(default_factory=dict)  # decode, and understand this engine's KV bytes

    def see(self, view: ClusterView, now: float) -> bool:
        """Take the loads over; False for an older view of the same monitor."""
        if view.epoch == self.seen[0] and view.number <= self.seen[1]:
            return False
        self.seen, self.seen_at, self._view = (view.epoch, view.number), now, view
        self.version += 1
        return True

    def expire(self, now: float) -> None:
        """Without a view for `view_s` the loads are forgotten, as if nobody had ever reported: what was offered since
        can be held against no report, and would count for ever. Everyone then counts as empty until a Refuse."""
        if self._view is not None and now - self.seen_at > self.own.view_s:
            self._view = None
            self.version += 1

    def outdate(self) -> None:
        """Count the loads as changed, although no view has come: whoever refused may be asked again."""
        self.version += 1

    def loads(self) -> dict[str, InstanceLoad]:
        """The newest reports by instance, perhaps of an earlier incarnation."""
        return {each.iid: each for each in self._view.loads} if self._view is not None else {}

    def update(self, membership: Membership) -> tuple[list[Action], list[str]]:
        """Take a roster over. Returns the connections to change, and the instances that are gone: left out of it, or
        restarted under another incarnation. An older roster of the same broker is ignored."""
        if membership.epoch == self.epoch and membership.number <= self.number:
            return [], []
        self.epoch, self.number = membership.epoch, membership.number
        self.version += 1  # whoever refused may be asked again
        old, self.instances = self.instances, {i.iid: i for i in membership.instances if i.iid != self.own.iid}
        if old == self.instances:
            return [], []  # as most often: it only says that the broker is there
        self.changed()
        self._able = {
            iid: instance
            for iid, instance in self.instances.items()
            if instance.role in DECODE_ROLES and self._speaks(instance)
        }
        gone = [iid for iid, was in old.items() if self._incarnation(iid) != was.incarnation]
        actions: list[Action] = [Disconnect(iid) for iid in gone]
        for iid in gone:
            self.up.pop(iid, None)
        for iid, instance in self.instances.items():
            if iid not in old or iid in gone:
                actions.append(Connect(iid, instance.inbox, instance.reach))
        return actions, gone

    def changed(self) -> None:
        """Others can be asked than before, this instance perhaps among them."""
        self.version += 1
        self.member_version += 1

    def connected(self, iid: str) -> None:
        self.up[iid] = None
        self.changed()

    def disconnected(self, iid: str) -> None:
        self.up.pop(iid, None)
        self.changed()

    def _incarnation(self, iid: str) -> int | None:
        return self.instances[iid].incarnation if iid in self.instances else None

    def knows(self, iid: str, incarnation: int) -> bool:
        """Whether this start of an instance is in the newest roster."""
        there = self.instances.get(iid)
        return iid == self.own.iid or (there is not None and there.incarnation == incarnation)

    def way(self, iid: str, incarnation: int) -> tuple[str, str] | None:
        """Over which path KV comes from this instance, and the segment that it comes out of; None when this start of
        it is not known (yet), or cannot be reached. From here to here there is always one."""
        if iid == self.own.iid:
            return "local", self.own.instance.reach.segment
        there = self.instances.get(iid)
        if there is None or there.incarnation != incarnation:
            return None
        path = pairing.path(self.own.instance.reach, there.reach)
        return None if path is None else (path, there.reach.segment)

    def _speaks(self, other: Instance) -> bool:
        """Whether KV can move between this engine and the other's."""
        same = other.fingerprint == self.own.instance.fingerprint
        return same and pairing.path(self.own.instance.reach, other.reach) is not None

    def prefills(self, tokens: int) -> bool:
        """Whether another instance that is there could prefill so many tokens for this engine."""
        return any(
            each.role in PREFILL_ROLES
            and self._speaks(each)
            and tokens <= each.capacity.tokens
            and tokens < each.capacity.context
            for each in self.instances.values()
        )

    def decoders(self) -> list[Instance]:
        """Reachable instances that take new decode work and understand this engine's KV bytes."""
        return [instance for iid, instance in self._able.items() if iid in self.up]
