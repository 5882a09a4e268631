"""Role changes, called flips (paper, section 3.5). An operator or the monitor's transition watcher asks for one; only
the broker carries it out.

The membership has the new role at once, so that no worker sends new work of the old role. The broker repeats the Flip
until a Heartbeat carries its number. The role alone would not confirm it: if an instance is flipped and flipped back,
a Heartbeat from before both has the right role, while a lost Flip leaves the instance in the wrong one. A flip lasts
as long as the worker's process: a restarted worker begins in its configured role.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from tetri.core.actions import Action, Broken, Reply, Send
from tetri.core.broker.compatibility import Compatibility
from tetri.core.broker.delivery import ANOTHERS, refuse
from tetri.core.broker.membership import Member, Members
from tetri.core.broker.observer import Observer
from tetri.policy.pairing import incompatibility
from tetri.request import DECODE_ROLES, PREFILL_ROLES, ROLES
from tetri.wire.clients import ChangeRole, Refused, RoleChanged
from tetri.wire.messages import Flip, FlipWanted

ANSWERS = 1000  # kept for operators that repeat a ChangeRole
NAMED = 8  # most instances that a refusal lists
Askers = dict[ChangeRole, tuple[bytes, float]]  # what was asked -> by which client, at what time


@dataclass(slots=True)
class Change:
    """A flip in progress. `number` identifies its Flip message; `askers` wait for its end."""

    number: int
    was: str
    role: str
    since: float
    askers: Askers = field(default_factory=dict)


class Flips:
    """Carries out role changes. `changes`: the flips in progress, by instance. Shares the broker's members,
    counters and observer."""

    def __init__(self, members: Members, counters: Counter[str], observer: Observer) -> None:
        self.members, self.counters, self.observer = members, counters, observer
        self.changes: dict[str, Change] = {}
        self._answers: dict[str, tuple[ChangeRole, Refused | RoleChanged]] = {}  # by its key, oldest first
        self._number = members.epoch  # of the last Flip; starts at the epoch to differ from an earlier broker's numbers

    # ------------------------------------------------------------ asking

    def ask(self, client: bytes, message: ChangeRole, now: float) -> list[Action]:
        """Handle an operator's ChangeRole. A repeated one gets the same answer and starts no second flip; another one
        with the same key is refused. The worker gets a Flip even if it seems to have the role already: an abandoned
        Flip may still be on its way to it."""
        asked, answer = self._known(message.key)
        if asked is None:
            return self._ask(client, message, now)
        if asked != message:
            return [refuse(client, message.key, ANOTHERS)]
        if answer is not None:
            return [Reply(client, answer)]
        askers = self.changes[message.iid].askers
        askers[message] = (client, askers[message][1])  # the operator gets the answer when the flip ends
        return []

    def _known(self, key: str) -> tuple[ChangeRole | None, Refused | RoleChanged | None]:
        """The ChangeRole of this key, and its answer if it has one."""
        waiting = (asked for change in self.changes.values() for asked in change.askers if asked.key == key)
        return self._answers.get(key) or (next(waiting, None), None)

    def _ask(self, client: bytes, message: ChangeRole, now: float) -> list[Action]:
        iid, role = message.iid, message.role
        why = self._problem(iid, role)
        if why is not None:
            return [self._refuse(client, message, why)]
        member = self.members.by_iid[iid]
        under_way = self.changes.get(iid)
        if under_way is not None and under_way.role == role:
            under_way.askers[message] = (client, now)
            return []
        actions = self._drop(iid, f"{iid} was asked to become {role} before it had answered")
        return [*actions, *self._turn(member, role, now, {message: (client, now)})]

    def want(self, message: FlipWanted, now: float) -> list[Action]:
        """Handle a FlipWanted of the transition watcher. A flip that an operator asked for has precedence. A flip that
        is not possible is only counted: the watcher asks again if it still wants it."""
        member = self.members.by_iid.get(message.iid)
        if message.iid in self.changes or self._problem(message.iid, message.role) is not None:
            self.counters["flips_refused"] += 1
            return []
        assert member is not None  # or there was a problem
        if member.role == message.role:
            return []
        return self._turn(member, message.role, now, {})

    def _turn(self, member: Member, role: str, now: float, askers: Askers) -> list[Action]:
        """Publish the new role first, then send the Flip, so that the worker gets no more work of the old role."""
        self._number += 1
        self.changes[member.iid] = Change(self._number, member.role, role, now, askers)
        if member.role == role:
            return [self._send(member.iid)]
        self.members.turn(member, role)
        return [*self.members.publish(now), self._send(member.iid)]

    def _send(self, iid: str) -> Send:
        change = self.changes[iid]
        return Send(iid, Flip(role=change.role, number=change.number))

    def _problem(self, iid: str, role: str) -> str | None:
        """Why a role change is not possible, in one line that states what is; None if it is possible."""
        members = self.members.by_iid
        if role not in ROLES:
            return f"there is no role {role!r}: give {', '.join(ROLES[:-1])} or {ROLES[-1]}"
        if iid not in members:
            names = [*sorted(members)[:NAMED], *(["..."] if len(members) > NAMED else [])]
            return f"there is no instance {iid!r}, only {', '.join(names)}" if names else "no instance is there"
        member = members[iid]
        if member.lost is not None:
            return f"{iid} is lost ({member.lost}): only a live instance changes its role"
        for phase, serving in (("prefill", PREFILL_ROLES), ("decode", DECODE_ROLES)):
            if member.role in serving and role not in serving:
                needed = self._needed(member, serving)
                if needed is not None:
                    both = member.role in PREFILL_ROLES and member.role in DECODE_ROLES
                    why = f"{iid} is the last {phase} instance{needed}: flip another one to {phase} first"
                    return f"{why}, or {f'leave it {member.role}' if both else 'make it mixed'}"
        return None

    def _needed(self, member: Member, serving: tuple[str, ...]) -> str | None:
        """For whom a member is the last in these roles: "" if there is no other one with the same fingerprint, else an
        instance that would exchange KV with none any more; None if nobody needs it."""
        live = [other for other in self.members.by_iid.values() if other is not member and other.lost is None]
        own = member.instance
        left = [each.instance for each in live if each.role in serving and each.instance.fingerprint == own.fingerprint]
        if not left:
            return ""
        left_over = Compatibility(left)
        for other in (each.instance for each in live if each.role not in serving):
            pairs_now = incompatibility(own.fingerprint, other.fingerprint, own.reach, other.reach) is None
            if pairs_now and not left_over.of(other).total:
                return f" that exchanges KV with {other.iid}"
        return None if left_over.of(own).total else f" on its side: {own.iid} exchanges KV with no other one"

    def check(self) -> None:
        """Check that each flip in progress is of a live member that has the new role. Raises Broken."""
        for iid, change in self.changes.items():
            member = self.members.by_iid.get(iid)
            if member is None or member.lost is not None or member.role != change.role:
                raise Broken(f"{iid} changes to {change.role}, but is lost or has another role in the membership")

    # ------------------------------------------------------------ answers

    def role_reported(self, member: Member, role: str, now: float, flip: int = 0) -> list[Action]:
        """Handle the role that a worker reports and the number of its last Flip. During a flip, send the Flip again
        until its number is reported. Otherwise adopt the reported role: an earlier broker may have flipped the worker,
        or the flip took effect while the worker counted as lost."""
        change = self.changes.get(member.iid)
        if change is None:
            if role != member.role and role in ROLES:
                self.observer.happened("role", member.iid, f"{member.role} > {role}, as it reports", now)
                self.members.turn(member, role)
            return []
        if (role, flip) != (change.role, change.number):
            if member.role != change.role:  # the worker has registered again, with its old role
                self.members.turn(member, change.role)
            return [self._send(member.iid)]
        del self.changes[member.iid]
        self.counters["flips"] += 1
        if change.was != role:
            self.observer.role_changed(member.iid, change.was, role, now - change.since, now)
        return [
            self._answer(
                *(client, asked),
                RoleChanged(key=asked.key, iid=member.iid, role=role, was=change.was, took_s=now - since),
            )
            for asked, (client, since) in change.askers.items()
        ]

    def gone(self, iid: str, why: str) -> list[Action]:
        """Drop the flip of a lost or restarted worker and refuse the operators that wait for it."""
        return self._drop(iid, f"{iid} did not change its role: {why}")

    def _drop(self, iid: str, why: str) -> list[Action]:
        change = self.changes.pop(iid, None)
        askers = change.askers.items() if change is not None else ()
        return [self._refuse(client, asked, why) for asked, (client, _) in askers]

    def _refuse(self, client: bytes, asked: ChangeRole, why: str) -> Reply:
        return self._answer(client, asked, Refused(key=asked.key, reason=why))

    def _answer(self, client: bytes, asked: ChangeRole, answer: Refused | RoleChanged) -> Reply:
        if len(self._answers) >= ANSWERS:
            del self._answers[next(iter(self._answers))]
        self._answers[asked.key] = (asked, answer)
        return Reply(client, answer)
