"""What workers tell the broker: who they are, what they hold, what they have computed, and that they are silent."""

from __future__ import annotations

from tetri.core.actions import BROKER, Action, Send
from tetri.core.broker.delivery import Delivery, Limits
from tetri.core.broker.lifecycle import Lifecycle
from tetri.core.broker.membership import Members
from tetri.core.broker.requests import BEFORE_TOKENS, ON_DECODER, Row, Table
from tetri.core.broker.roles import Flips
from tetri.request import Stage
from tetri.wire.messages import Close, Failed, FromWorker, Heartbeat, Ready, Staged, TokenItem, Tokens


class WorkerEvents:
    """Works on the broker's own parts."""

    def __init__(
        self, limits: Limits, table: Table, members: Members, delivery: Delivery, lifecycle: Lifecycle, flips: Flips
    ) -> None:
        self.limits, self.table, self.members = limits, table, members
        self.delivery, self.lifecycle, self.flips = delivery, lifecycle, flips

    # ------------------------------------------------------------ who is there

    def ready(self, event: Ready, now: float) -> list[Action]:
        iid = event.instance.iid
        if iid == BROKER:
            return []  # others would take it for this process
        actions, replaced = self.members.ready(event, now)
        self.lifecycle.timers.set(("silence", iid), now + self.limits.dead_s)
        if replaced is not None:
            self.lifecycle.counters["workers_replaced"] += 1
            why = f"{iid} was restarted"
            actions += [*self.flips.gone(iid, why), *self.lifecycle.restart_all(iid, why, now)]
        actions += self.flips.role_reported(self.members.by_iid[iid], event.instance.role, now)
        return [*actions, *self.members.publish(now), *self.lifecycle.place_waiting(now)]

    def up(self, iid: str, now: float) -> list[Action]:
        self.members.connected(iid)
        return [*self.members.publish(now), *self.lifecycle.place_waiting(now)]

    def down(self, iid: str, now: float) -> list[Action]:
        self.members.disconnected(iid)
        return self._lose(iid, "connection lost", now)

    def silent(self, iid: str, now: float) -> list[Action]:
        """Its timer is due. A first time it may be the broker that did not listen: what waits in its sockets is heard
        before the worker counts as lost."""
        peer = self.members.by_iid.get(iid)
        if peer is None or peer.lost is not None:
            return []
        silent_at = peer.seen + self.limits.dead_s
        if now < silent_at:
            self.lifecycle.timers.set(("silence", iid), silent_at)
            return []
        if peer.suspect:
            return self._lose(iid, f"silent for {self.limits.dead_s:g} s", now)
        peer.suspect = True
        self.lifecycle.timers.set(("silence", iid), now + self.limits.heartbeat_s)
        return []

    def _lose(self, iid: str, why: str, now: float) -> list[Action]:
        peer = self.members.by_iid.get(iid)
        if peer is None or peer.lost is not None:
            return []
        self.members.lose(peer, why)
        self.lifecycle.counters["workers_lost"] += 1
        announced = [*self.flips.gone(iid, why), *self.members.publish(now)]
        restarted = self.lifecycle.restart_all(iid, f"{iid}: {why}", now)
        return [*announced, *restarted, *self.lifecycle.place_waiting(now)]  # who is left may take more than before

    # ------------------------------------------------------------ what they say

    def received(self, event: FromWorker, now: float) -> list[Action]:
        peer = self.members.known(event)
        if peer is None:
            return []  # it registers when it hears no roster
        peer.seen, peer.suspect = now, False
        actions: list[Action] = []
        if peer.lost is not None and peer.iid in self.members.up:
            self.members.lose(peer, None)
            self.lifecycle.timers.set(("silence", peer.iid), now + self.limits.dead_s)
            actions += self.lifecycle.place_waiting(now)
        match event:
            case Tokens():
                for item in event.items:
                    self._tokens(item, event.iid, now, actions)
            case Heartbeat() | Staged() if peer.lost is not None:
                pass  # it may be dead already, and nobody would notice it again
            case Heartbeat():
                peer.load, peer.held, peer.counters = event.load, len(event.holds), event.counters
                peer.slots_used, peer.predictor = event.slots_used, event.predictor
                flipped = self.flips.role_reported(peer, event.role, now, event.flip)
                actions += [*flipped, *self.lifecycle.place_waiting(now)] if flipped else ()
                actions += self._reconcile(event, now)
            case Staged() | Failed():
                row = self._row(event.rid, event.attempt)
                actions += () if row is None else self._row_event(row, event, now)
        return actions

    def _row(self, rid: str, attempt: int) -> Row | None:
        """The open row that a worker speaks of, None when it is over, this attempt is, or nobody can have it."""
        row = self.table.rows.get(rid)
        return row if row and row.attempt == attempt and row.reason is None and row.prefill else None

    def _row_event(self, row: Row, event: Staged | Failed, now: float) -> list[Action]:
        match event:
            case Staged():
                return self.lifecycle.stage(row, event.stage, event.iid, now)
            case Failed() if row.holder != event.iid:
                return []  # another instance has it all by now
            case Failed(retry=True):
                return self.lifecycle.restart(row, event.why, now)
        return self.lifecycle.end(row, "error", now, event.why)

    def _tokens(self, item: TokenItem, iid: str, now: float, actions: list[Action]) -> None:
        """Appends to `actions`: this runs for every token of everybody."""
        row = self._row(item.rid, item.attempt)
        if row is None:
            return
        have, ids, start = len(row.output), item.ids, item.start
        if start > have:
            actions.append(self.lifecycle.resend(row, iid))
            return
        if start != have or have + len(ids) > row.sampling.max_tokens:
            ids = ids[have - start :][: row.sampling.max_tokens - have]
        if not ids and item.end is None:
            return
        row.output += ids
        if ids and row.first_at is None:
            row.first_at = now
        if row.decode is None and row.stage in BEFORE_TOKENS:
            self.table.advance(row, Stage.MOVING, now)
        if item.end is not None:
            row.end = item.end
            actions += self.lifecycle.end(row, item.end.reason, now)
        elif len(row.output) == row.sampling.max_tokens:  # its worker should have said so
            actions += self.lifecycle.end(row, "length", now)
        else:
            actions += self.delivery.detokenize(row, final=False)

    def _reconcile(self, heartbeat: Heartbeat, now: float) -> list[Action]:
        """What a worker holds against what the table says it holds."""
        actions: list[Action] = []
        iid = heartbeat.iid
        held: dict[str, None] = {}
        for hold in heartbeat.holds:
            row = self._row(hold.rid, hold.attempt)
            if row is None:
                actions.append(Send(iid, Close(rid=hold.rid, attempt=hold.attempt)))
                continue
            held[hold.rid] = None
            if hold.stage in ON_DECODER and hold.stage is not row.stage:
                actions += self.lifecycle.stage(row, hold.stage, iid, now)
            if row.decode is not None and row.decode != iid and hold.stage is not Stage.DONE:
                actions.append(Send(iid, Close(rid=hold.rid, attempt=hold.attempt)))
            elif hold.outputs > len(row.output) or hold.stage is Stage.DONE:
                actions.append(self.lifecycle.resend(row, iid))
        missing = [row for rid, row in self.table.held_by(iid).items() if rid not in held and row.reason is None]
        for row in missing:
            actions += self.lifecycle.not_held(row, iid, now)
        return actions
