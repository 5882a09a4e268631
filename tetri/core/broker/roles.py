"""Changes of role (paper, section 3.5): asked for by a client or by the monitor's transition watcher, carried out by
the broker alone.

From the moment of asking the registry's role is the new one, so that nobody sends new work of the old role; the worker
is told until a Heartbeat of it names the number of this very Flip. The role alone would not do: when an instance is flipped
and flipped back, a Heartbeat from before both says the right role, while a lost Flip leaves it in the wrong one. A worker
that restarts before that begins in the role that it is configured for, as does one that restarts later: a flip lives as
long as the process that it was made in.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from tetri.core.actions import Action, Broken, Reply, Send
from tetri.core.broker.delivery import refuse
from tetri.core.broker.membership import Member, Members
from tetri.request import DECODE_ROLES, PREFILL_ROLES, ROLES
from tetri.wire.clients import ChangeRole, Refused, RoleChanged
from tetri.wire.messages import Flip, FlipWanted

ANSWERS = 1000  # so many are kept for clients that ask again
NAMED = 8  # instances, in an answer that says who is there


@dataclass(slots=True)
class Change:
    """A flip under way, of this number: who asked for it, each with its key and the time."""

    number: int
    was: str
    role: str
    askers: dict[str, tuple[bytes, float]] = field(default_factory=dict)


class Flips:
    """`changes`: those under way, by instance. Works on the broker's own registry and counters."""

    def __init__(self, members: Members, counters: Counter[str]) -> None:
        self.members, self.counters = members, counters
        self.changes: dict[str, Change] = {}
        self._answers: dict[str, Refused | RoleChanged] = {}  # by the client's key, oldest first
        self._number = members.epoch  # of the last Flip: not one that an earlier broker gave

    # ------------------------------------------------------------ asking

    def ask(self, client: bytes, message: ChangeRole, now: float) -> list[Action]:
        """A client wants it. The same key again is the same question: no second flip follows from it. A worker is asked
        even if it has the role as far as is known here: a Flip that was given up may still be on its way to it."""
        key, iid, role = message.key, message.iid, message.role
        if key in self._answers:
            return [Reply(client, self._answers[key])]
        for change in self.changes.values():
            if key in change.askers:
                change.askers[key] = (client, change.askers[key][1])  # the answer comes when there is one
                return []
        why = self._problem(iid, role)
        if why is not None:
            return [self._refuse(client, key, why)]
        member = self.members.by_iid[iid]
        under_way = self.changes.get(iid)
        if under_way is not None and under_way.role == role:
            under_way.askers[key] = (client, now)
            return []
        actions = self._drop(iid, f"{iid} was asked to become {role} before it had answered")
        return [*actions, *self._turn(member, role, now, {key: (client, now)})]

    def want(self, message: FlipWanted, now: float) -> list[Action]:
        """The transition watcher wants it. What a person has asked for comes first; a wish that cannot be fulfilled
        is counted, and comes again if it still stands."""
        member = self.members.by_iid.get(message.iid)
        if message.iid in self.changes or self._problem(message.iid, message.role) is not None:
            self.counters["flips_refused"] += 1
            return []
        assert member is not None  # or there was a problem
        if member.role == message.role:
            return []
        return self._turn(member, message.role, now, {})

    def _turn(self, member: Member, role: str, now: float, askers: dict[str, tuple[bytes, float]]) -> list[Action]:
        """First everyone else learns it, then the worker: nobody sends it work of the old role any more."""
        self._number += 1
        self.changes[member.iid] = Change(self._number, member.role, role, askers)
        if member.role == role:
            return [self._send(member.iid)]
        self.members.turn(member, role)
        return [*self.members.publish(now), self._send(member.iid)]

    def _send(self, iid: str) -> Send:
        change = self.changes[iid]
        return Send(iid, Flip(role=change.role, number=change.number))

    def _problem(self, iid: str, role: str) -> str | None:
        """Why this cannot be, in one line that says what can."""
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
            if member.role in serving and role not in serving and not self._others(member, serving):
                mixed = "leave it mixed" if member.role == "mixed" else "make it mixed"
                return f"{iid} is the last {phase} instance: flip another one to {phase} first, or {mixed}"
        return None

    def _others(self, member: Member, serving: tuple[str, ...]) -> bool:
        """Whether another live instance takes such work; one that it can exchange KV with."""
        return any(
            other.role in serving
            for other in self.members.by_iid.values()
            if other is not member and other.lost is None and other.instance.fingerprint == member.instance.fingerprint
        )

    def check(self) -> None:
        for iid, change in self.changes.items():
            member = self.members.by_iid.get(iid)
            if member is None or member.lost is not None or member.role != change.role:
                raise Broken(f"{iid} is to become {change.role}, and is not there or counts as something else")

    # ------------------------------------------------------------ answers

    def role_reported(self, member: Member, role: str, now: float, flip: int = 0) -> list[Action]:
        """A worker says its role, and which Flip it obeyed last. While it is asked to change, it is told again until
        that is the one; else its own word counts: it may have been flipped under an earlier broker, or while it was
        thought to be lost."""
        change = self.changes.get(member.iid)
        if change is None:
            if role != member.role and role in ROLES:
                self.members.turn(member, role)
                return self.members.publish(now)
            return []
        if (role, flip) != (change.role, change.number):
            if member.role != change.role:  # it has registered again
                self.members.turn(member, change.role)
            return [self._send(member.iid)]
        del self.changes[member.iid]
        self.counters["flips"] += 1
        return [
            self._answer(client, RoleChanged(key=key, iid=member.iid, role=role, was=change.was, took_s=now - since))
            for key, (client, since) in change.askers.items()
        ]

    def gone(self, iid: str, why: str) -> list[Action]:
        """It was lost or restarted: nobody waits for its answer any more."""
        return self._drop(iid, f"{iid} did not change its role: {why}")

    def _drop(self, iid: str, why: str) -> list[Action]:
        change = self.changes.pop(iid, None)
        askers = change.askers.items() if change is not None else ()
        return [self._refuse(client, key, why) for key, (client, _) in askers]

    def _refuse(self, client: bytes, key: str, why: str) -> Reply:
        reply = refuse(client, key, why)
        assert isinstance(reply.message, Refused)
        return self._answer(client, reply.message)

    def _answer(self, client: bytes, answer: Refused | RoleChanged) -> Reply:
        if len(self._answers) >= ANSWERS:
            del self._answers[next(iter(self._answers))]
        self._answers[answer.key] = answer
        return Reply(client, answer)
