"""What workers tell the broker: who they are, what they hold, what they have computed, and that they are silent."""

from __future__ import annotations

from tetri.core.actions import BROKER, Action, Send
from tetri.core.desk import Desk, Limits
from tetri.core.flips import Flips
from tetri.core.life import Life
from tetri.core.registry import Registry
from tetri.core.table import BEFORE_TOKENS, ON_DECODER, Row, Table
from tetri.request import Stage
from tetri.wire.messages import Beat, Close, Failed, FromWorker, Ready, Staged, TokenItem, Tokens


class News:
    """Works on the broker's own parts."""

    def __init__(
        self, limits: Limits, table: Table, registry: Registry, desk: Desk, life: Life, flips: Flips
    ) -> None:
        self.limits, self.table, self.registry = limits, table, registry
        self.desk, self.life, self.flips = desk, life, flips

    # ------------------------------------------------------------ who is there

    def ready(self, event: Ready, now: float) -> list[Action]:
        iid = event.instance.iid
        if iid == BROKER:
            return []  # others would take it for this process
        actions, replaced = self.registry.ready(event, now)
        self.life.timers.set(("silence", iid), now + self.limits.dead_s)
        if replaced is not None:
            self.life.counters["workers_replaced"] += 1
            why = f"{iid} was restarted"
            actions += [*self.flips.gone(iid, why), *self.life.restart_all(iid, why, now)]
        actions += self.flips.heard(self.registry.peers[iid], event.instance.role, now)
        return [*actions, *self.registry.publish(now), *self.life.place_waiting(now)]

    def up(self, iid: str, now: float) -> list[Action]:
        self.registry.connected(iid)
        return [*self.registry.publish(now), *self.life.place_waiting(now)]

    def down(self, iid: str, now: float) -> list[Action]:
        self.registry.disconnected(iid)
        return self._lose(iid, "connection lost", now)

    def silent(self, iid: str, now: float) -> list[Action]:
        """Its timer is due. A first time it may be the broker that did not listen: what waits in its sockets is heard
        before the worker counts as lost."""
        peer = self.registry.peers.get(iid)
        if peer is None or peer.lost is not None:
            return []
        heard_until = peer.seen + self.limits.dead_s
        if now < heard_until:
            self.life.timers.set(("silence", iid), heard_until)
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
        self.registry.lose(peer, why)
        self.life.counters["workers_lost"] += 1
        told = [*self.flips.gone(iid, why), *self.registry.publish(now)]
        restarted = self.life.restart_all(iid, f"{iid}: {why}", now)
        return [*told, *restarted, *self.life.place_waiting(now)]  # who is left may take more than before

    # ------------------------------------------------------------ what they say

    def heard(self, event: FromWorker, now: float) -> list[Action]:
        peer = self.registry.known(event)
        if peer is None:
            return []  # it registers when it hears no roster
        peer.seen, peer.suspect = now, False
        actions: list[Action] = []
        if peer.lost is not None and peer.iid in self.registry.up:
            self.registry.lose(peer, None)
            self.life.timers.set(("silence", peer.iid), now + self.limits.dead_s)
            actions += self.life.place_waiting(now)
        match event:
            case Tokens():
                for item in event.items:
                    self._tokens(item, event.iid, now, actions)
            case Beat() | Staged() if peer.lost is not None:
                pass  # it may be dead already, and nobody would notice it again
            case Beat():
                peer.load, peer.held, peer.counters = event.load, len(event.holds), event.counters
                peer.slots_taken, peer.predictor = event.slots_taken, event.predictor
                turned = self.flips.heard(peer, event.role, now, event.flip)
                actions += [*turned, *self.life.place_waiting(now)] if turned else ()
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
                return self.life.stage(row, event.stage, event.iid, now)
            case Failed() if row.holder != event.iid:
                return []  # another instance has it all by now
            case Failed(retry=True):
                return self.life.restart(row, event.why, now)
        return self.life.end(row, "error", now, event.why)

    def _tokens(self, item: TokenItem, iid: str, now: float, actions: list[Action]) -> None:
        """Appends to `actions`: this runs for every token of everybody."""
        row = self._row(item.rid, item.attempt)
        if row is None:
            return
        have, ids, start = len(row.output), item.ids, item.start
        if start > have:
            actions.append(self.life.resend(row, iid))
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
            actions += self.life.end(row, item.end.reason, now)
        elif len(row.output) == row.sampling.max_tokens:  # its worker should have said so
            actions += self.life.end(row, "length", now)
        else:
            actions += self.desk.word(row, final=False)

    def _reconcile(self, beat: Beat, now: float) -> list[Action]:
        """What a worker holds against what the table says it holds."""
        actions: list[Action] = []
        iid = beat.iid
        held: dict[str, None] = {}
        for hold in beat.holds:
            row = self._row(hold.rid, hold.attempt)
            if row is None:
                actions.append(Send(iid, Close(rid=hold.rid, attempt=hold.attempt)))
                continue
            held[hold.rid] = None
            if hold.stage in ON_DECODER and hold.stage is not row.stage:
                actions += self.life.stage(row, hold.stage, iid, now)
            if row.decode is not None and row.decode != iid and hold.stage is not Stage.DONE:
                actions.append(Send(iid, Close(rid=hold.rid, attempt=hold.attempt)))
            elif hold.outputs > len(row.output) or hold.stage is Stage.DONE:
                actions.append(self.life.resend(row, iid))
        missing = [row for rid, row in self.table.held_by(iid).items() if rid not in held and row.reason is None]
        for row in missing:
            actions += self.life.not_held(row, iid, now)
        return actions
