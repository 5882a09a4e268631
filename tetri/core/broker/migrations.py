"""Running choices that go on at another decode instance: the broker's side of decode migration. How the KV moves, and
why no two instances ever write for one attempt, is in core/decode/migration.py."""

from __future__ import annotations

from collections import Counter

from tetri.core.actions import Action, Broken, Send
from tetri.core.broker.closes import Closes
from tetri.core.broker.membership import Members
from tetri.core.broker.observer import Observer
from tetri.core.broker.requests import Choice, Move, Table
from tetri.core.broker.suspects import is_suspect
from tetri.instance import Fingerprint
from tetri.policy.migrate import AHEAD, gives_up, none
from tetri.policy.rules import MIGRATIONS
from tetri.policy.views import DecodeInstance, RunningDecode
from tetri.request import Stage, blocks_for
from tetri.wire.messages import Close, ClusterView, Hold, Migrate, NotMigrated

REST_S = 5.0  # so long an instance is asked to take no choice after one that it did not take


class Migrations:
    """Moves running choices. Shares the broker's table, members, observer and counters, and its closes. `moving`: the
    choices under way, by id. `rests`: instances that have not taken one, and until when none is sent there."""

    def __init__(
        self, policy: str, table: Table, members: Members, observer: Observer, closes: Closes, counters: Counter[str]
    ) -> None:
        """`policy`: the name of a migration policy."""
        self._policy = MIGRATIONS[policy]
        self.table, self.members, self.observer, self.closes = table, members, observer, closes
        self.counters = counters
        self.moving: dict[str, Choice] = {}
        self.rests: dict[str, float] = {}

    def plan(self, view: ClusterView, now: float) -> list[Action]:
        """Move the choices that the policy names, by the newest loads."""
        if self._policy is none or not any([gives_up(r.role, r.load.running, r.load.free_blocks) for r in view.loads]):
            return []  # the usual case, fast
        outgoing, arriving = self._under_way()
        alike: dict[Fingerprint, list[DecodeInstance]] = {}
        for report in view.loads:
            member = self.members.by_iid.get(report.iid)
            if member is None or member.lost is not None or report.incarnation != member.instance.incarnation:
                continue
            coming, going = arriving.get(report.iid, ()), outgoing.get(report.iid, ())
            places = report.load.running + report.load.waiting + len(coming)
            takes = report.iid not in view.keeps and self.rests.get(report.iid, now) <= now
            instance = DecodeInstance(
                *(report.iid, member.role),
                free_blocks=report.load.free_blocks - sum([decode.needs for decode in coming]),
                running=report.load.running,
                places=member.instance.capacity.max_batch - places if takes else 0,
                outgoing=len(going),
                outgoing_blocks=sum([decode.blocks for decode in going]),
            )
            alike.setdefault(member.instance.fingerprint, []).append(instance)
        actions: list[Action] = []
        for instances in alike.values():
            sources = {
                each.iid: self._decodes(each.iid)
                for each in instances
                if gives_up(each.role, each.running, each.free_blocks)
            }
            for name, to in self._policy(instances, sources) if sources else ():
                actions += self.start(self.table.choices[name], to)
        return actions

    def _under_way(self) -> tuple[dict[str, list[RunningDecode]], dict[str, list[RunningDecode]]]:
        """The choices under way, by the instance that they leave, and by the one where they go on."""
        outgoing: dict[str, list[RunningDecode]] = {}
        arriving: dict[str, list[RunningDecode]] = {}
        for choice in self.moving.values():
            assert choice.decode is not None and choice.move is not None
            decode = _decode(choice, self.members.by_iid[choice.decode].instance.capacity.block_tokens)
            outgoing.setdefault(choice.decode, []).append(decode)
            arriving.setdefault(choice.move.to, []).append(decode)
        return outgoing, arriving

    def _decodes(self, iid: str) -> list[RunningDecode]:
        size = self.members.by_iid[iid].instance.capacity.block_tokens
        return [_decode(choice, size) for choice in self.table.held_by(iid).values() if self._may_move(choice)]

    def _may_move(self, choice: Choice) -> bool:
        """Whether a choice runs, and is on no other way. A suspect must be alone."""
        runs = choice.stage is Stage.DECODE and choice.reason is None and choice.decode is not None
        return runs and choice.move is None and not is_suspect(choice.request)

    def start(self, choice: Choice, to: str) -> list[Action]:
        """Move a choice to another instance, if it runs."""
        target = self.members.by_iid.get(to)
        if not self._may_move(choice) or choice.decode == to or target is None or target.lost is not None:
            return []
        choice.newest += 1
        choice.move = Move(to, choice.newest)
        self.moving[choice.id] = choice
        return [self._send(choice, to)]

    def _send(self, choice: Choice, to: str) -> Send:
        assert choice.decode is not None
        return Send(choice.decode, Migrate(rid=choice.id, attempt=choice.attempt, to=to, next=choice.newest))

    def landed(self, rid: str, attempt: int, iid: str, now: float) -> list[Action]:
        """An instance reports a choice as if it held all its KV. If it is the one that the choice moves to, it holds
        the choice from now on."""
        choice = self.table.choices.get(rid)
        if choice is None or choice.reason is not None or choice.move != Move(iid, attempt):
            return []
        source, before = choice.decode, choice.attempt
        assert source is not None
        self.over(choice)
        self.counters["migrated"] += 1
        self.table.migrate(choice, iid, attempt, now)
        self.observer.decodes(choice, iid, now)
        return [self.closes.send(source, Close(rid=choice.id, attempt=before))]

    def awaits(self, hold: Hold, iid: str) -> bool:
        """Whether an instance holds what is still on its way there."""
        choice = self.table.choices.get(hold.rid)
        return choice is not None and choice.reason is None and choice.move == Move(iid, hold.attempt)

    def not_migrated(self, event: NotMigrated, choice: Choice, now: float) -> list[Action]:
        """The source of a choice could not hand it over. A `held` one waits to hear that it goes on there."""
        move = choice.move
        if choice.decode != event.iid:
            return []
        if move is not None and event.next == move.attempt:
            self.rests[move.to] = now + REST_S
            self.counters["not_migrated"] += 1
            self.over(choice)
        return [self._send(choice, event.iid)] if event.held and choice.move is None else []

    def held(self, choice: Choice, hold: Hold, iid: str) -> list[Action]:
        """The instance that decodes a choice lists it in its heartbeat: repeat a Migrate that may be lost. One that is
        waiting there, and has been decoded, has stopped for a move that is over."""
        if choice.decode != iid:
            return []
        if choice.move is not None:
            return [self._send(choice, choice.move.to)]
        stopped = hold.stage is Stage.WAITING and choice.stage is Stage.DECODE and choice.newest > 1
        return [self._send(choice, iid)] if stopped else []

    def lost(self, iid: str) -> list[Action]:
        """An instance is lost: what was on its way there goes on where it is."""
        gone = [choice for choice in self.moving.values() if choice.move is not None and choice.move.to == iid]
        for choice in gone:
            self.over(choice)
        return [self._send(choice, choice.decode) for choice in gone if choice.decode is not None]

    def over(self, choice: Choice) -> None:
        """End the move of a choice, if there is one. Its attempt is void, unless the choice takes it."""
        choice.move = None
        self.moving.pop(choice.id, None)

    def check(self) -> None:
        """Raise Broken when the moves disagree with the table."""
        moving = {choice.id for choice in self.table.active() if choice.move is not None}
        if moving != {*self.moving}:
            raise Broken(f"moving are {moving}, counted {list(self.moving)}")
        for choice in self.moving.values():
            if choice.stage is not Stage.DECODE or choice.move is None or choice.move.attempt != choice.newest:
                raise Broken(f"{choice.id} is {choice.stage} and moves to {choice.move}, of {choice.newest} attempts")


def _decode(choice: Choice, block_tokens: int) -> RunningDecode:
    """A running choice as migration policies see it."""
    tokens, left = len(choice.request.prompt) + len(choice.output), choice.sampling.max_tokens - len(choice.output)
    needs = blocks_for(tokens + min(AHEAD, left), block_tokens)
    return RunningDecode(choice.id, blocks_for(tokens, block_tokens), needs, left)
