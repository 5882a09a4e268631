"""The broker's core: owns the life of every request, places it on a prefill instance, relays its tokens, and
starts it over when a worker is lost. Nothing relies on one message arriving: beats say what workers hold, and
`_reconcile` makes both sides agree again.
"""

from __future__ import annotations

from random import Random

from tetri.core.actions import (
    BROKER,
    Action,
    Broken,
    BrokerInput,
    FromClient,
    Reply,
    Send,
    Submitted,
    Undelivered,
    Worded,
)
from tetri.core.desk import Desk, Limits, refuse
from tetri.core.life import Life
from tetri.core.registry import Registry
from tetri.core.table import Row, Table
from tetri.policy.rules import Rules
from tetri.request import Stage
from tetri.wire.clients import Attach, Cancel, Inspect, Status
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.messages import Beat, Close, Failed, Finished, FromWorker, Ready, Staged, TokenItem, Tokens

VIEW = ("view", "")


class Broker:
    def __init__(self, limits: Limits, rules: Rules, epoch: int, rng: Random, now: float, model: str = "") -> None:
        self.limits, self.model = limits, model
        self.table = Table()
        self.registry = Registry(epoch)
        self.desk = Desk(self.table, limits, epoch, rng)
        self.life = Life(limits, rules, self.table, self.registry, self.desk)
        self.life.timers.set(VIEW, now)

    # ------------------------------------------------------------ the four verbs

    def handle(self, event: BrokerInput, now: float) -> list[Action]:
        match event:
            case Submitted():
                return self._submit(event, now)
            case FromClient():
                return self._client(event, now)
            case Worded():
                return self._worded(event, now)
            case Undelivered():
                return self._undelivered(event, now)
            case PeerUp():
                self.registry.up[event.peer] = None
                return [*self.registry.publish(now), *self.life.place_waiting(now)]
            case PeerDown():
                self.registry.up.pop(event.peer, None)
                return self._lose(event.peer, "connection lost", now)
            case Ready():
                return self._ready(event, now)
            case FromWorker():
                return self._from_worker(event, now)
        raise Broken(f"a broker knows no {event}")

    def tick(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for what, who in self.life.timers.due(now):
            if what == "view":
                self.life.timers.set(VIEW, now + self.limits.beat_s)
                if not self.table.open:
                    self.check()
                actions += [*self.registry.prune(now), *self.registry.refresh(now)]
            elif what == "silence":
                actions += self._silent(who, now)
            else:
                actions += self._row_timer(what, self.table.rows[who], now)
        return actions

    def deadline(self) -> float | None:
        return self.life.timers.next()

    def check(self) -> None:
        self.table.check()
        for row in self.table.active():
            placed = self.registry.peers.get(row.holder) if row.holder else None
            if row.reason is None and row.holder is not None and (placed is None or placed.lost is not None):
                raise Broken(f"{row.rid} is held by {row.holder}, which is not there")

    # ------------------------------------------------------------ clients

    def _submit(self, event: Submitted, now: float) -> list[Action]:
        again = self.desk.known(event)
        if again is not None:
            return again
        why = self.desk.problem(event) or self.registry.too_long(
            len(event.prompt), len(event.prompt) + event.sampling.max_tokens
        )
        if why is not None:
            self.life.counters["refused"] += 1
            return [refuse(event.client, event.key, why)]
        if self.table.open >= self.limits.max_open:
            self.life.counters["refused"] += 1
            return [refuse(event.client, event.key, f"{self.table.open} requests are open, try later", 1.0)]
        self.life.counters["accepted"] += 1
        row, actions = self.desk.admit(event, now)
        if event.deadline_s is not None:
            self.life.timers.set(("deadline", row.rid), now + event.deadline_s)
        return [*actions, *self.life.place(row, now)]

    def _client(self, event: FromClient, now: float) -> list[Action]:
        message = event.message
        if isinstance(message, Inspect):
            return [Reply(event.client, self.status())]
        assert isinstance(message, Cancel | Attach)
        row = self.table.rows.get(message.rid)
        if row is None:
            return [refuse(event.client, message.rid, f"no request {message.rid} is known here")]
        if isinstance(message, Attach):
            self.life.timers.clear(("grace", row.rid))
            return self.desk.attach(row, event.client, message.start)
        if row.stage.ended:
            return [Reply(event.client, row.letters[-1])]
        if event.client != row.client:
            row.watchers.append(event.client)
        return self.life.end(row, "cancelled", now)

    def _worded(self, event: Worded, now: float) -> list[Action]:
        row = self.table.rows.get(event.rid)
        if row is None or row.stage.ended:
            return []
        ended = row.reason is not None
        actions = self.desk.worded(row, event)
        if row.reason is not None and not ended:
            actions += self.life.close(row)
        return [*actions, *self.life.finish(row, now)] if row.reason and (event.final or not ended) else actions

    def _undelivered(self, event: Undelivered, now: float) -> list[Action]:
        row = self.desk.undelivered(event)
        if row is not None:
            what, wait = ("grace", self.limits.client_grace_s) if event.gone else ("retry", self.limits.retry_s)
            self.life.timers.set((what, row.rid), now + wait)
        return []

    def _row_timer(self, what: str, row: Row, now: float) -> list[Action]:
        match what:
            case "forget":
                waits = row.client is not None and row.sent < len(row.letters)
                if waits and now - row.stage_at < self.limits.patience_s:  # a slow reader, not a gone one
                    self.life.timers.set(("forget", row.rid), now + self.limits.client_grace_s)
                    return []
                for timer in ("grace", "retry"):
                    self.life.timers.clear((timer, row.rid))
                self.table.forget(row.rid)
                return []
            case "retry":
                row.blocked = False
                return self.desk.deliver(row)
            case "grace":
                return self.life.end(row, "cancelled", now) if row.client is None else []
            case "deadline":
                return self.life.end(row, "deadline", now)
            case "patience":
                return self.life.end(row, "error", now, f"no prefill instance for {self.limits.patience_s:g} s")
        raise Broken(f"a timer for {what}")

    # ------------------------------------------------------------ workers

    def _ready(self, event: Ready, now: float) -> list[Action]:
        if event.iid == BROKER:
            return []  # others would take it for this process
        actions, replaced = self.registry.ready(event, now)
        self.life.timers.set(("silence", event.iid), now + self.limits.dead_s)
        if replaced:
            self.life.counters["workers_replaced"] += 1
            actions += self.life.restart_all(event.iid, f"{event.iid} was restarted", now)
        return [*actions, *self.registry.publish(now), *self.life.place_waiting(now)]

    def _from_worker(self, event: FromWorker, now: float) -> list[Action]:
        peer = self.registry.known(event)
        if peer is None:
            return []  # it registers when it hears no view
        peer.seen, peer.suspect = now, False
        self.life.timers.set(("silence", peer.iid), now + self.limits.dead_s)
        back = peer.lost is not None and peer.iid in self.registry.up
        peer.lost = None if back else peer.lost
        actions = self.life.place_waiting(now) if back else []
        match event:
            case Beat() | Staged() if peer.lost is not None:
                return actions  # it may be dead already, and nobody would notice it again
            case Tokens():
                actions += [action for item in event.items for action in self._tokens(item, event.iid, now)]
            case Beat():
                peer.load, peer.held = event.load, len(event.holds)
                actions += self._reconcile(event, now)
            case Staged() | Finished() | Failed():
                row = self._row(event.rid, event.attempt)
                actions += [] if row is None else self._row_event(row, event, now)
        return actions

    def _row(self, rid: str, attempt: int) -> Row | None:
        """The open row that a worker speaks of, None when it is over, this attempt is, or nobody can have it."""
        row = self.table.rows.get(rid)
        return row if row and row.attempt == attempt and row.reason is None and row.prefill else None

    def _row_event(self, row: Row, event: Staged | Finished | Failed, now: float) -> list[Action]:
        match event:
            case Staged():
                return self.life.stage(row, event.stage, event.iid, now)
            case Failed() if row.holder != event.iid:
                return []  # another instance has it all by now
            case Failed(retry=True):
                return self.life.restart(row, event.why, now)
            case Failed():
                return self.life.end(row, "error", now, event.why)
        row.finished = event
        return self._ended(row, event.iid, now)

    def _tokens(self, item: TokenItem, iid: str, now: float) -> list[Action]:
        row = self._row(item.rid, item.attempt)
        if row is None:
            return []
        have = len(row.output)
        if item.start > have:
            return [self.life.resend(row, iid)]
        new = item.ids[have - item.start :][: row.sampling.max_tokens - have]
        if not new:
            return []
        row.output += new
        row.last = item.reason if len(row.output) == item.start + len(item.ids) else None
        row.first_at = now if row.first_at is None else row.first_at
        if row.stage in (Stage.QUEUED, Stage.PREFILL):
            row.advance(Stage.MOVING, now)
        return [*self.desk.word(row, final=False), *self._ended(row, iid, now)]

    def _ended(self, row: Row, iid: str, now: float) -> list[Action]:
        if row.finished is None:
            return []
        if len(row.output) < row.finished.outputs:
            return [self.life.resend(row, iid)]
        return self.life.end(row, row.finished.reason, now)

    def _reconcile(self, beat: Beat, now: float) -> list[Action]:
        """What a worker holds against what the table says it holds."""
        actions: list[Action] = []
        held: dict[str, int] = {}
        for hold in beat.holds:
            row = self._row(hold.rid, hold.attempt)
            if row is None:
                actions.append(Send(beat.iid, Close(rid=hold.rid, attempt=hold.attempt)))
                continue
            held[hold.rid] = hold.attempt
            if hold.stage in (Stage.WAITING, Stage.DECODE):
                actions += self.life.stage(row, hold.stage, beat.iid, now)
            if row.decode is not None and row.decode != beat.iid and hold.stage is not Stage.DONE:
                actions.append(Send(beat.iid, Close(rid=hold.rid, attempt=hold.attempt)))
            elif hold.outputs > len(row.output) or (hold.stage is Stage.DONE and row.finished is None):
                actions.append(self.life.resend(row, beat.iid))
        for row in self.table.held_by(beat.iid):
            if row.rid not in held and row.reason is None:
                actions += self.life.not_held(row, beat.iid, now)
        return actions

    def _silent(self, iid: str, now: float) -> list[Action]:
        """A first time it may be the broker that did not listen: what waits in its sockets is heard first."""
        peer = self.registry.peers.get(iid)
        if peer is None or peer.lost is not None:
            return []
        if peer.suspect:
            return self._lose(iid, f"silent for {self.limits.dead_s:g} s", now)
        peer.suspect = True
        self.life.timers.set(("silence", iid), now + self.limits.beat_s)
        return []

    def _lose(self, iid: str, why: str, now: float) -> list[Action]:
        peer = self.registry.peers.get(iid)
        if peer is None or peer.lost is not None:
            return []
        peer.lost = why
        self.life.counters["workers_lost"] += 1
        return [*self.registry.publish(now), *self.life.restart_all(iid, f"{iid}: {why}", now)]

    def status(self) -> Status:
        counters = dict(sorted(self.life.counters.items()))
        return Status(
            instances=self.registry.status(),
            requests=self.table.counts(),
            counters=counters,
            model=self.model,
        )
