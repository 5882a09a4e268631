"""Membership: the instances that the broker knows, their roles and connections, the Membership messages that it
publishes, and the pools of prefill instances that routing chooses from."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sized
from dataclasses import dataclass, field, replace
from math import inf
from typing import Protocol

from tetri.core.actions import Action, Broken, Connect, Disconnect, Send
from tetri.core.broker.clock_offset import ClockOffset
from tetri.core.broker.compatibility import Compatibility, Found, compatible_pairs
from tetri.instance import Capacity, Instance
from tetri.policy.views import PrefillPool
from tetri.request import DECODE_ROLES, PREFILL_ROLES, PredictorStatus, StepRatio, blocks_for
from tetri.wire.clients import InstanceStatus
from tetri.wire.load import Load
from tetri.wire.messages import ClusterView, FromWorker, Heartbeat, Membership, Ready
from tetri.wire.observation import Activity

FORGET_S = 600.0  # seconds that a lost worker stays in the status
SILENCE_S = 0.8  # most seconds between two Memberships: without one for `view_s`, 2 s, a worker registers again
GATHER_S = 0.05  # least seconds between two Memberships: when many workers come or go at once, one tells of many
LEAST_SHARE = 0.02  # of its time that prefill gets on an instance, however busy its decodes are
EMPTY_POOL = PrefillPool()
NONE_FOUND = Found({}, "")


@dataclass(slots=True)
class Member:
    """One worker. `role` decides which new work it gets: during a flip it is already the new role. `seen`: time of its
    last message. `lost`: the reason why it counts as lost, None while it is live."""

    instance: Instance
    load: Load
    seen: float
    held: int = 0
    counters: dict[str, int] = field(default_factory=dict)
    slots_used: int = 0
    predictor: PredictorStatus | None = None
    unread_by: dict[str, str] = field(default_factory=dict)
    step_ratio: StepRatio = StepRatio()
    slowness: float = 1.0  # of its prefill, over the broker's cost table; see Costs
    activity: Activity = Activity()
    clock: ClockOffset = field(default_factory=ClockOffset)
    suspect: bool = False  # its silence timer was due once; see Broker._silent
    alone: tuple[str, int] | None = None  # rid and attempt of the request whose lone step it runs (LoneStep)
    lost: str | None = None

    @property
    def iid(self) -> str:
        """Instance id."""
        return self.instance.iid

    @property
    def role(self) -> str:
        """prefill, decode, mixed or auto."""
        return self.instance.role


class Assigned(Protocol):
    """What is assigned to each instance (`requests.Table`)."""

    work_ns: dict[str, int]

    def held_by(self, iid: str) -> Sized:
        """The open requests of an instance."""


class Members:
    """All registered workers: `by_iid` includes the lost ones, `up` has those with a connection. Change either of
    them, or a role, through a method only: Membership messages and pools are derived from them. `serial` counts the
    Memberships sent: workers report the last one that they have read."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.by_iid: dict[str, Member] = {}
        self.up: dict[str, None] = {}
        self.number = self.serial = 0
        self._published: dict[str, Instance] = {}  # the instances of Membership `number`
        self._changed: dict[str, None] = {}  # members that may differ from `_published`
        self._need_whole: dict[str, None] = {}  # connected members that a change would not be enough for
        self._sent_at = -inf
        self._sorted = False  # the pools are up to date
        self._limits: list[int] = []  # ascending; pool i holds the instances that take prompts of limit i tokens
        self._pools: list[PrefillPool] = []
        self._columns: list[dict[str, int]] = []  # of each pool: iid -> column
        self._recounted: set[str] = set()  # instances whose queues in the pools are out of date
        self._shares: dict[str, float] = {}  # as of the newest view
        self._keeping: dict[str, str] = {}
        self._decoders: list[Capacity] = []  # of the live ones
        self._largest: dict[str, float] = {}  # phase -> tokens that its largest instance holds; inf: none is live
        self._compatible: dict[str, Compatibility] = {}  # role -> the instances that this role exchanges KV with
        self._pairs: list[tuple[str, str]] | None = None  # as of the last change; None: not asked for since

    # ------------------------------------------------------------ registration and loss

    def ready(self, message: Ready, now: float) -> tuple[list[Action], Member | None]:
        """Register a worker. Returns the actions that connect to it and the member that it replaces if that one has
        another incarnation, else None; the requests of a replaced member are lost. What a process has reported before
        stays known when it registers again: its counts never go back."""
        instance = message.instance
        old = self.by_iid.get(instance.iid)
        replaced = old is not None and old.instance.incarnation != instance.incarnation
        known = Member(instance, message.load, now) if old is None or replaced else old
        self.by_iid[instance.iid] = replace(
            known, instance=instance, load=message.load, seen=now, suspect=False, lost=None
        )
        self._note(instance.iid)
        if instance.iid in self.up:
            self._need_whole[instance.iid] = None
        return [Connect(instance.iid, instance.inbox)], old if replaced else None

    def known(self, message: FromWorker) -> Member | None:
        """The member that sent this message; None if its incarnation is not registered."""
        member = self.by_iid.get(message.iid)
        return member if member is not None and member.instance.incarnation == message.incarnation else None

    def read(self, message: Heartbeat) -> int:
        """The last Membership of this broker that the worker has read: it has read the messages before it too, or they
        are lost. 0: none."""
        return message.read if message.epoch == self.epoch else 0

    def connected(self, iid: str) -> None:
        """Record that the connection to a worker stands."""
        self.up[iid] = None
        self._need_whole[iid] = None
        self._outdate()

    def disconnected(self, iid: str) -> None:
        """Record that the connection to a worker broke."""
        self.up.pop(iid, None)
        self._need_whole.pop(iid, None)
        self._outdate()

    def lose(self, member: Member, why: str | None) -> None:
        """Mark a worker as lost for this reason, or as live again with None."""
        member.lost = why
        self._note(member.iid)

    def turn(self, member: Member, role: str) -> None:
        """Change a worker's role: it gets new work of this role from now on."""
        member.instance = member.instance.in_role(role)
        self._note(member.iid)

    def prune(self, now: float) -> list[Action]:
        """Forget workers that have been lost for FORGET_S and close their connections."""
        gone = [p.iid for p in self.by_iid.values() if p.lost is not None and now - p.seen > FORGET_S]
        for iid in gone:
            del self.by_iid[iid]
            self.disconnected(iid)
        return [Disconnect(iid) for iid in gone]

    def _note(self, iid: str) -> None:
        self._changed[iid] = None
        self._outdate()

    def _outdate(self) -> None:
        self._sorted, self._pairs = False, None

    # ------------------------------------------------------------ Membership messages

    def publish(self, now: float) -> list[Action]:
        """Send all changes since the last Membership to every connected worker; to one that has just connected or has
        registered again, the whole Membership. All receivers of a change get the same object, which is encoded once."""
        since, (changed, gone) = self.number, self._differences()
        self._changed = {}
        self.number += bool(changed or gone)
        self._published.update({instance.iid: instance for instance in changed})
        for iid in gone:
            del self._published[iid]
        if self.up:
            self._sent_at = now
        self.serial += 1
        epoch, number, serial, all_live = self.epoch, self.number, self.serial, [*self._published.values()]
        change = Membership(epoch=epoch, number=number, serial=serial, instances=changed, since=since, gone=gone)
        whole = Membership(epoch=epoch, number=number, serial=serial, instances=all_live)
        sends = [Send(iid, whole if iid in self._need_whole else change) for iid in self.up]
        self._need_whole = {}
        return [*sends]

    def publish_due(self, now: float) -> list[Action]:
        """What `publish` returns, if something has changed and the last Membership is GATHER_S old."""
        due = self.publish_at()
        return [] if due is None or now < due else self.publish(now)

    def publish_at(self) -> float | None:
        """When the next change is sent; None if nothing has changed. Changes wait until a worker is connected."""
        waits = self.up and (self._changed or self._need_whole)
        return self._sent_at + GATHER_S if waits else None

    def refresh(self, now: float) -> list[Action]:
        """A Membership if none was sent for SILENCE_S, even without a change: workers treat silence as a fault."""
        return self.publish(now) if now - self._sent_at >= SILENCE_S else []

    def _differences(self) -> tuple[list[Instance], list[str]]:
        """The instances that are new or different since the last Membership, and the ids of those that are gone."""
        changed: list[Instance] = []
        gone: list[str] = []
        for iid in self._changed:
            member = self.by_iid.get(iid)
            if member is not None and member.lost is None:
                if self._published.get(iid) != member.instance:
                    changed.append(member.instance)
            elif iid in self._published:
                gone.append(iid)
        return changed, gone

    def _live(self) -> list[Member]:
        return [member for member in self.by_iid.values() if member.lost is None]

    # ------------------------------------------------------------ pools

    def pool(self, tokens: int, assigned: Assigned) -> PrefillPool:
        """The instances that may prefill `tokens` tokens, with what is assigned to each. An instance qualifies if it is
        connected, has the memory, and can hand its KV to a live decode instance; while no decode instance is live, the
        last condition is dropped. Returns the same object until an instance changes."""
        if not self._sorted:
            self._sort()
        index = bisect_left(self._limits, tokens)
        if index == len(self._limits):
            return EMPTY_POOL
        if self._recounted:
            self._count(assigned)
        return self._pools[index]

    def recount(self, iid: str) -> None:
        """What is assigned to an instance, or its slowness, has changed."""
        self._recounted.add(iid)

    def _count(self, assigned: Assigned) -> None:
        """Update what has changed: a request must not cost more, the more instances there are."""
        for iid in self._recounted:
            for pool, columns in zip(self._pools, self._columns, strict=True):
                if iid in columns:
                    pool.queued_s[columns[iid]] = self._queued_s(iid, assigned)
                    pool.requests[columns[iid]] = self._requests(iid, assigned)
        self._recounted.clear()

    def _queued_s(self, iid: str, assigned: Assigned) -> float:
        return 1e-9 * assigned.work_ns.get(iid, 0) * self.by_iid[iid].slowness

    def _requests(self, iid: str, assigned: Assigned) -> int:
        """The open requests of an adaptive instance that decodes, and 1; 0 for any other."""
        adaptive = self.by_iid[iid].role == "auto" and iid not in self._keeping
        return 1 + len(assigned.held_by(iid)) if adaptive else 0

    def check(self, assigned: Assigned) -> None:
        """Raise Broken when a count in a pool is out of date and nobody has said so."""
        for pool in self._pools if self._sorted else ():
            for column, iid in enumerate(pool.iids):
                if iid not in self._recounted:
                    found = (pool.queued_s[column], pool.requests[column])
                    right = (self._queued_s(iid, assigned), self._requests(iid, assigned))
                    if found != right:
                        raise Broken(f"{iid}: {found} listed, {right} counted")

    def viewed(self, view: ClusterView) -> None:
        """Apply a new view: how much of its time prefill gets on each adaptive instance, and which keep to prefill."""
        shares = {each.iid: max(each.load.share, LEAST_SHARE) for each in view.loads if each.role == "auto"}
        self._recounted |= self._keeping.keys() ^ view.keeps.keys()
        self._keeping = view.keeps
        if shares != self._shares:
            self._shares = shares
            for pool in self._pools:
                pool.share = [shares.get(iid, 1.0) for iid in pool.iids]

    def too_long(self, prompt: int, total: int) -> str | None:
        """Why no live instance can hold a request of `prompt` prompt tokens and `total` tokens; None if one can."""
        if not self._sorted:
            self._sort()
        for phase, tokens in (("prefill", prompt), ("decode", total)):
            most = self._largest[phase]
            if most < tokens:
                return f"{tokens} tokens fit into no {phase} instance: the largest holds {most}"
        return None

    def too_many(self, prompt: int, n: int) -> str | None:
        """Why no live decode instance can begin `n` choices of a prompt at once, each with a copy of its KV; None if
        one can."""
        if n == 1:
            return None
        if not self._sorted:
            self._sort()
        if not self._decoders:
            return None
        most = max(min(each.max_batch, each.blocks // blocks_for(prompt, each.block_tokens)) for each in self._decoders)
        if n <= most:
            return None
        return f"n is {n}: no decode instance can begin more than {most} choices of {prompt} prompt tokens at once"

    def output_limit(self, prompt: int) -> float:
        """Output tokens that the largest live decode instance holds after a prompt; infinite while none is live."""
        if not self._sorted:
            self._sort()
        return self._largest["decode"] - prompt

    def beyond(self, tokens: int) -> str | None:
        """Why no prefill instance, lost ones included, can hold `tokens` tokens of a restarted request; None if one
        can. A lost instance counts because it may return."""
        sizes = [member.instance.capacity.tokens for member in self.by_iid.values() if member.role in PREFILL_ROLES]
        most = max(sizes, default=tokens)
        if tokens <= most:
            return None
        return f"{tokens} tokens, its output so far included, fit into no prefill instance: the largest holds {most}"

    def pairs(self) -> list[tuple[str, str]]:
        """The prefill and decode instances that are in service and exchange KV, as pairs of ids. Returns the same
        object until an instance changes."""
        if self._pairs is None:
            ready = [member.instance for member in self._live() if member.iid in self.up]
            prefillers = [instance for instance in ready if instance.role in PREFILL_ROLES]
            decoders = [instance for instance in ready if instance.role in DECODE_ROLES]
            self._pairs = compatible_pairs(prefillers, decoders)
        return self._pairs

    def _sort(self) -> None:
        """Sort the instances into pools: once per change, not once per request."""
        live = [member.instance for member in self._live()]
        decoders = [instance for instance in live if instance.role in DECODE_ROLES]
        prefillers = [instance for instance in live if instance.role in PREFILL_ROLES]
        self._decoders = [instance.capacity for instance in decoders]
        phases = (("prefill", prefillers), ("decode", decoders))
        self._largest = {phase: max((each.capacity.tokens for each in able), default=inf) for phase, able in phases}
        to_decode = Compatibility(decoders)
        both = dict.fromkeys(("mixed", "auto"), Compatibility(live))
        self._compatible = {"prefill": to_decode, "decode": Compatibility(prefillers), **both}
        able: list[tuple[int, str]] = []
        for instance in prefillers:
            choice = to_decode.of(instance).total
            if instance.iid in self.up and (not decoders or choice):
                alone = choice == 1 and instance.role in DECODE_ROLES and len(prefillers) > 1
                able.append((min(_prompt_limit(instance.capacity, alone), instance.capacity.context - 1), instance.iid))
        self._limits = sorted({limit: None for limit, _ in able})
        pools = ([iid for limit, iid in able if limit >= least] for least in self._limits)
        self._pools = [self._new_pool(iids) for iids in pools]
        self._columns = [{iid: column for column, iid in enumerate(pool.iids)} for pool in self._pools]
        self._recounted = set(self.by_iid)
        self._sorted = True

    def _new_pool(self, iids: list[str]) -> PrefillPool:
        """A pool in which nothing is counted yet."""
        share = [self._shares.get(iid, 1.0) for iid in iids]
        return PrefillPool(iids, [0.0] * len(iids), share, [0] * len(iids))

    # ------------------------------------------------------------ status

    def status(self) -> list[InstanceStatus]:
        """The status of every member, by iid."""
        return [
            InstanceStatus(
                iid=member.iid,
                role=member.role,
                state="ready" if member.lost is None and member.iid in self.up else "lost",
                incarnation=member.instance.incarnation,
                blocks=member.instance.capacity.blocks,
                load=member.load,
                held=member.held,
                note=member.lost or self._exchanges(member).incompatibility or _unlinked(member) or _rehearsal(member),
                paths=self._exchanges(member).paths,
                counters=member.counters,
                slots_used=member.slots_used,
                predictor=member.predictor,
                unread_by=member.unread_by,
                step_ratio=member.step_ratio,
                activity=member.activity,
                keeps=self._keeping.get(member.iid, ""),
            )
            for member in sorted(self.by_iid.values(), key=lambda member: member.iid)
        ]

    def _exchanges(self, member: Member) -> Found:
        """The live members that a member exchanges KV with. Two instances of the same phase never do."""
        if not self._sorted:
            self._sort()
        return NONE_FOUND if member.lost is not None else self._compatible[member.role].others(member.instance)


def _unlinked(member: Member) -> str:
    """A note for the status if another program has removed the worker's segment (kv/unnamed.py)."""
    removed = member.counters.get("segment_unlinked")
    return "its segment was removed from /dev/shm: see tetri-cli doctor" if removed else ""


def _rehearsal(member: Member) -> str:
    """A note for the status if a worker injects faults on purpose; such a worker must not serve users."""
    injected = any(name.startswith("injected_") for name in member.counters)
    return "a rehearsal: faults are injected here (transfer.faults, transfer.cuts)" if injected else ""


def _prompt_limit(capacity: Capacity, alone: bool) -> int:
    """Most prompt tokens that an instance may prefill. `alone`: it is the only decode instance for its own prompts,
    while other instances can prefill too. Such a prompt must fit twice, since the prefill keeps its memory until all
    KV is in the KV store."""
    return capacity.blocks // 2 * capacity.block_tokens if alone else capacity.tokens
