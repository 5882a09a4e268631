"""The other instances: their membership, loads and connections."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from tetri.core.actions import Action, Connect, Disconnect
from tetri.core.instance.identity import Identity
from tetri.instance import Instance
from tetri.policy import pairing
from tetri.request import DECODE_ROLES, PREFILL_ROLES
from tetri.wire.messages import ClusterView, InstanceLoad, Membership


@dataclass(slots=True)
class Peers:
    """The instances of the newest Membership, their loads in the newest ClusterView, and the open connections.

    instances        all instances but this one, by id
    up               ids of connected instances
    epoch, number    of the newest Membership
    listed           whether it lists this incarnation of this instance
    behind           whether a Membership was missed: changes cannot be applied until a whole one arrives
    read             epoch and serial of the last Membership that was read, applied or not
    seen, seen_at    epoch and number of the newest ClusterView, and when it arrived
    member_version   increases when the set of usable decode instances may have changed
    version          increases then too, and when the loads have changed
    """

    own: Identity
    instances: dict[str, Instance] = field(default_factory=dict)
    up: dict[str, None] = field(default_factory=dict)
    epoch: int = 0
    number: int = -1
    listed: bool = False
    behind: bool = True
    read: tuple[int, int] = (0, 0)
    seen: tuple[int, int] = (0, -1)
    seen_at: float = 0.0
    version: int = 0
    member_version: int = 0
    _view: ClusterView | None = None
    _decoders: dict[str, Instance] = field(default_factory=dict)  # those that take decode work and are KV compatible

    def see(self, view: ClusterView, now: float) -> bool:
        """Apply a new view. Return False for an older one of the same monitor."""
        if view.epoch == self.seen[0] and view.number <= self.seen[1]:
            return False
        kept = {} if self._view is None else self._view.keeps
        self.seen, self.seen_at, self._view = (view.epoch, view.number), now, view
        self.version += 1
        self.member_version += view.keeps != kept
        return True

    def expire(self, now: float) -> None:
        """Forget the loads when no view has arrived for `view_s`. Without new reports, reservations would count for
        ever; without loads, each instance counts as empty until it refuses."""
        if self._view is not None and now - self.seen_at > self.own.view_s:
            self.member_version += bool(self._view.keeps)
            self._view = None
            self.version += 1

    def outdate(self) -> None:
        """Count the loads as changed without a new view, so that instances that refused are asked again."""
        self.version += 1

    @property
    def informed(self) -> bool:
        """Whether the loads are known."""
        return self._view is not None

    def keeps(self, iid: str) -> bool:
        """Return whether an instance keeps to prefill for now."""
        return self._view is not None and iid in self._view.keeps

    def prefills_only(self) -> bool:
        """Return whether this instance keeps to prefill, and another one can decode what it prefills."""
        return self.keeps(self.own.iid) and any(iid in self.up and not self.keeps(iid) for iid in self._decoders)

    def loads(self) -> dict[str, InstanceLoad]:
        """Return the newest reports by instance, perhaps of an earlier incarnation."""
        return {each.iid: each for each in self._view.loads} if self._view is not None else {}

    def update(self, membership: Membership) -> tuple[list[Action], list[str]]:
        """Apply a new membership; ignore an older one of the same broker, and a change of one that was missed. Return
        the connections to change, and the instances that have disappeared: missing, or restarted under another
        incarnation."""
        read = membership.epoch, membership.serial
        self.read = max(read, self.read) if read[0] == self.read[0] else read
        same, whole = membership.epoch == self.epoch, membership.since is None
        if same and membership.number < self.number + (whole and not self.behind):
            return [], []
        if not whole and not (same and membership.since == self.number):
            self.behind = self.behind or not same or membership.number > self.number
            return [], []
        self.epoch, self.number = membership.epoch, membership.number
        self.version += 1  # instances that refused may be asked again
        if not (whole or membership.instances or membership.gone):
            return [], []  # the usual case: it only shows that the broker is alive
        return self._replace(membership)

    def _replace(self, membership: Membership) -> tuple[list[Action], list[str]]:
        whole, own = membership.since is None, self.own
        old, listed = self.instances, {instance.iid: instance for instance in membership.instances}
        if whole or own.iid in listed or own.iid in membership.gone:
            self.listed = own.iid in listed and listed[own.iid].incarnation == own.incarnation
        self.behind = self.behind and not whole
        listed.pop(own.iid, None)
        removed = dict.fromkeys(membership.gone)
        kept = {} if whole else {iid: instance for iid, instance in old.items() if iid not in removed}
        self.instances = {**kept, **listed}
        if old == self.instances:
            return [], []
        self.changed()
        self._decoders = {instance.iid: instance for instance in self._serving(DECODE_ROLES)}
        gone = [iid for iid, before in old.items() if not self.knows(iid, before.incarnation)]
        for iid in gone:
            self.up.pop(iid, None)
        fresh = [instance for iid, instance in self.instances.items() if iid not in old or iid in gone]
        connects = [Connect(instance.iid, instance.inbox, instance.reach) for instance in fresh]
        return [*map(Disconnect, gone), *connects], gone

    def changed(self) -> None:
        """Count the set of usable decode instances as changed, this instance included."""
        self.version += 1
        self.member_version += 1

    def connected(self, iid: str) -> None:
        """Record that a connection to an instance is up."""
        self.up[iid] = None
        self.changed()

    def disconnected(self, iid: str) -> None:
        """Record that the connection to an instance is down."""
        self.up.pop(iid, None)
        self.changed()

    def knows(self, iid: str, incarnation: int) -> bool:
        """Return whether this incarnation of an instance is in the newest membership."""
        instance = self.instances.get(iid)
        return iid == self.own.iid or (instance is not None and instance.incarnation == incarnation)

    def way(self, iid: str, incarnation: int) -> tuple[str, str] | None:
        """Return the path and the segment from which this incarnation of an instance can be read, or None when it is
        not known (yet) or has no common path. This instance can always read its own KV."""
        if iid == self.own.iid:
            return "local", self.own.instance.reach.segment
        if not self.knows(iid, incarnation):
            return None
        reach = self.instances[iid].reach
        path = pairing.path(self.own.instance.reach, reach)
        return None if path is None else (path, reach.segment)

    def _serving(self, roles: tuple[str, ...]) -> list[Instance]:
        """Return the other instances in these roles with which this one can exchange KV."""
        own, others = self.own.instance, [other for other in self.instances.values() if other.role in roles]
        same = [other for other in others if other.fingerprint == own.fingerprint]
        return [other for other in same if pairing.path(own.reach, other.reach) is not None]

    def prefills(self, tokens: int, without: Collection[str] = ()) -> bool:
        """Return whether another instance, not one of `without`, could prefill so many tokens for this one."""
        sizes = [instance.capacity for instance in self._serving(PREFILL_ROLES) if instance.iid not in without]
        return any(tokens <= capacity.tokens and tokens < capacity.context for capacity in sizes)

    def decoders(self) -> list[Instance]:
        """Return the connected, KV compatible instances that take new decode work."""
        able = [instance for iid, instance in self._decoders.items() if iid in self.up]
        return [instance for instance in able if not self.keeps(instance.iid)] or able
