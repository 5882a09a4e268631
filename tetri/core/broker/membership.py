"""The instances as the broker knows them: who is there, since when silent, which role each has, the roster that it
publishes and the pools of prefill instances that it chooses from."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from tetri.core.actions import Action, Connect, Disconnect, Send
from tetri.core.broker.compatibility import Compatibility, Found
from tetri.instance import Instance
from tetri.policy.views import PrefillPool
from tetri.request import DECODE_ROLES, PREFILL_ROLES, Capacity, PredictorStatus
from tetri.wire.clients import InstanceStatus
from tetri.wire.messages import FromWorker, Load, Membership, Ready

FORGET_S = 600.0  # a lost worker stays in the status for so long
SILENCE_S = 0.8  # a worker that hears no roster for `view_s`, 2 s, registers again
NOBODY = PrefillPool()
NOTHING = Found({}, "")


@dataclass(slots=True)
class Member:
    """One worker. `role` is the truth for whoever sends new work: the one asked for, from the moment of asking on.
    `lost` says why it is out, None while it is in."""

    instance: Instance
    load: Load
    seen: float
    held: int = 0
    counters: dict[str, int] = field(default_factory=dict)
    slots_used: int = 0
    predictor: PredictorStatus | None = None
    suspect: bool = False  # silent for longer than allowed, as far as was heard
    lost: str | None = None

    @property
    def iid(self) -> str:
        return self.instance.iid

    @property
    def role(self) -> str:
        return self.instance.role


class Members:
    """`peers` by iid, the lost ones included. `up`: to which of them a connection stands. Whatever changes either, or
    a role, goes through a method: the roster and the pools follow from them."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.by_iid: dict[str, Member] = {}
        self.up: dict[str, None] = {}
        self.number = 0
        self._outdated = True  # the roster that was sent last is out of date
        self._entries: list[Instance] = []
        self._sent_at = 0.0
        self._sorted = False  # the pools are up to date
        self._limits: list[int] = []  # ascending; pool i holds who computes prompts of at least limit i tokens
        self._pools: list[PrefillPool] = []
        self._largest: dict[str, int] = {}  # phase -> tokens that the largest instance of it holds
        self._compatible: dict[str, Compatibility] = {}  # role -> those with which one of this role would exchange KV

    # ------------------------------------------------------------ who is there

    def ready(self, message: Ready, now: float) -> tuple[list[Action], Member | None]:
        """Enter a worker. The peer of the other incarnation that it replaces, whose requests are lost, if any."""
        instance = message.instance
        old = self.by_iid.get(instance.iid)
        self.by_iid[instance.iid] = Member(instance, message.load, now)
        self._changed()
        replaced = old is not None and old.instance.incarnation != instance.incarnation
        return [Connect(instance.iid, instance.inbox)], old if replaced else None

    def known(self, message: FromWorker) -> Member | None:
        """The peer that sent this, if this incarnation of it has registered."""
        member = self.by_iid.get(message.iid)
        return member if member is not None and member.instance.incarnation == message.incarnation else None

    def connected(self, iid: str) -> None:
        self.up[iid] = None
        self._changed()

    def disconnected(self, iid: str) -> None:
        self.up.pop(iid, None)
        self._changed()

    def lose(self, member: Member, why: str | None) -> None:
        """It is out, or with None in again."""
        member.lost = why
        self._changed()

    def turn(self, member: Member, role: str) -> None:
        """From now on new work goes to it as to one of this role."""
        member.instance = member.instance.in_role(role)
        self._changed()

    def prune(self, now: float) -> list[Action]:
        """Give up the connections to workers that have been lost for long: they may never come back."""
        gone = [p.iid for p in self.by_iid.values() if p.lost is not None and now - p.seen > FORGET_S]
        for iid in gone:
            del self.by_iid[iid]
            self.disconnected(iid)
        return [Disconnect(iid) for iid in gone]

    def _changed(self) -> None:
        self._outdated, self._sorted = True, False

    # ------------------------------------------------------------ rosters

    def publish(self, now: float) -> list[Action]:
        """The next Membership, to everyone that can be reached."""
        self.number += 1
        if self._outdated:
            self._entries, self._outdated = [member.instance for member in self._there()], False
        self._sent_at = now
        membership = Membership(epoch=self.epoch, number=self.number, instances=self._entries)
        return [Send(iid, membership) for iid in self.up]

    def refresh(self, now: float) -> list[Action]:
        """A Membership when there is news, and now and then when there is none, so that silence means trouble."""
        return self.publish(now) if self._outdated or now - self._sent_at >= SILENCE_S else []

    def _there(self) -> list[Member]:
        return [member for member in self.by_iid.values() if member.lost is None]

    # ------------------------------------------------------------ pools

    def pool(self, tokens: int, work_ns: dict[str, int]) -> PrefillPool:
        """The instances that may prefill so many tokens, each with the work that it has. They can be reached, hold
        the tokens and can hand their KV to somebody: to a decode instance that is there or, while none is, to whoever
        comes. The same object every time while nothing changes among the instances."""
        if not self._sorted:
            self._sort()
        index = bisect_left(self._limits, tokens)
        if index == len(self._limits):
            return NOBODY
        pool = self._pools[index]
        pool.queued_s[:] = [1e-9 * work_ns.get(iid, 0) for iid in pool.iids]
        return pool

    def too_long(self, prompt: int, total: int) -> str | None:
        """Why a request of so many tokens fits into no instance that is there; None when one may take it."""
        if not self._sorted:
            self._sort()
        for phase, tokens in (("prefill", prompt), ("decode", total)):
            most = self._largest[phase]
            if 0 < most < tokens:
                return f"{tokens} tokens fit into no {phase} instance: the largest holds {most}"
        return None

    def beyond(self, tokens: int) -> str | None:
        """Why so many tokens of a request that starts over can be prefilled nowhere, nor by one that may come back."""
        sizes = [member.instance.capacity.tokens for member in self.by_iid.values() if member.role in PREFILL_ROLES]
        most = max(sizes, default=tokens)
        if tokens <= most:
            return None
        return f"{tokens} tokens, its output so far included, fit into no prefill instance: the largest holds {most}"

    def _sort(self) -> None:
        """Sort the instances into pools: once per change, not per request."""
        there = [member.instance for member in self._there()]
        decoders = [instance for instance in there if instance.role in DECODE_ROLES]
        prefillers = [instance for instance in there if instance.role in PREFILL_ROLES]
        self._largest = {
            "prefill": max((instance.capacity.tokens for instance in prefillers), default=0),
            "decode": max((instance.capacity.tokens for instance in decoders), default=0),
        }
        takers = Compatibility(decoders)
        self._compatible = {"prefill": takers, "decode": Compatibility(prefillers), "mixed": Compatibility(there)}
        able: list[tuple[int, str]] = []
        for instance in prefillers:
            choice = takers.of(instance).total
            if instance.iid in self.up and (not decoders or choice):
                alone = choice == 1 and instance.role in DECODE_ROLES and len(prefillers) > 1
                able.append((min(_prompt_limit(instance.capacity, alone), instance.capacity.context - 1), instance.iid))
        self._limits = sorted({limit: None for limit, _ in able})
        self._pools = []
        for least in self._limits:
            iids = [iid for limit, iid in able if limit >= least]
            self._pools.append(PrefillPool(iids, [0.0] * len(iids)))
        self._sorted = True

    # ------------------------------------------------------------ status

    def status(self) -> list[InstanceStatus]:
        return [
            InstanceStatus(
                iid=member.iid,
                role=member.role,
                state="ready" if member.lost is None and member.iid in self.up else "lost",
                incarnation=member.instance.incarnation,
                blocks=member.instance.capacity.blocks,
                free_blocks=member.load.free_blocks,
                queued=member.load.queued,
                running=member.load.running,
                held=member.held,
                note=member.lost or self._exchanges(member).incompatibility or _rehearsal(member),
                paths=self._exchanges(member).paths,
                counters=member.counters,
                slots_used=member.slots_used,
                predictor=member.predictor,
            )
            for member in sorted(self.by_iid.values(), key=lambda member: member.iid)
        ]

    def _exchanges(self, member: Member) -> Found:
        """Of those that are there: over which paths KV moves to and from it. Two of one phase never meet."""
        if not self._sorted:
            self._sort()
        return NOTHING if member.lost is not None else self._compatible[member.role].others(member.instance)


def _rehearsal(member: Member) -> str:
    """That a worker harms its KV on purpose: nobody may take that for service."""
    injected = any(name.startswith("injected_") for name in member.counters)
    return "a rehearsal: faults are injected here (transfer.faults)" if injected else ""


def _prompt_limit(capacity: Capacity, alone: bool) -> int:
    """Tokens of a prompt that an instance may prefill. What only it can decode must fit twice, if another instance can
    prefill it (`alone`): here the prefill keeps its memory until all the KV has left for the KV store."""
    return capacity.blocks // 2 * capacity.block_tokens if alone else capacity.tokens
