"""The life of a request in the broker: placed, started over, moved on, ended."""

from __future__ import annotations

from collections import Counter

from tetri.core.actions import Action, Send
from tetri.core.desk import Desk, Limits
from tetri.core.registry import Registry
from tetri.core.table import Row, Table
from tetri.core.timers import Timers
from tetri.policy.rules import PREFILL_ROUTES, Rules
from tetri.policy.views import PrefillView
from tetri.request import Stage
from tetri.wire.messages import Assign, Close, Resend


class Life:
    """Works on the broker's own table, registry, timers and counters."""

    def __init__(self, limits: Limits, rules: Rules, table: Table, registry: Registry, desk: Desk) -> None:
        self.limits, self.rules = limits, rules
        self.table, self.registry, self.desk = table, registry, desk
        self.timers: Timers[tuple[str, str]] = Timers()
        self.counters: Counter[str] = Counter()
        self._load: dict[str, int] = {}
        self._load_at: float | None = None

    def place(self, row: Row, now: float) -> list[Action]:
        able = self.registry.prefillers(len(row.prompt) + len(row.output))
        load = self._outstanding(now) if able else {}
        views = [PrefillView(peer.iid, load.get(peer.iid, 0)) for peer in able]
        row.prefill = PREFILL_ROUTES[self.rules.prefill_route](views)
        if row.prefill is None:
            if ("patience", row.rid) not in self.timers:  # or whoever comes in vain would prolong it
                self.timers.set(("patience", row.rid), now + self.limits.patience_s)
            return []
        load[row.prefill] = load.get(row.prefill, 0) + row.outstanding
        self.timers.clear(("patience", row.rid))
        return [self.assign(row, now)]

    def _outstanding(self, now: float) -> dict[str, int]:
        """Prompt tokens that each prefill instance has still to compute. Summed once for all rows that are placed
        at the same moment: after the loss of a worker these may be thousands."""
        if self._load_at != now:
            self._load, self._load_at = {}, now
            for row in self.table.active():
                if row.prefill is not None:
                    self._load[row.prefill] = self._load.get(row.prefill, 0) + row.outstanding
        return self._load

    def assign(self, row: Row, now: float) -> Action:
        row.assigned_at = now
        assert row.prefill is not None
        assign = Assign(
            rid=row.rid,
            attempt=row.attempt,
            prompt=list(row.prompt),
            output=list(row.output),
            sampling=row.sampling,
        )
        return Send(row.prefill, assign)

    def place_waiting(self, now: float) -> list[Action]:
        rows = [row for row in self.table.active() if row.prefill is None and row.reason is None]
        return [action for row in rows if row.stage is Stage.QUEUED for action in self.place(row, now)]

    def restart(self, row: Row, why: str, now: float) -> list[Action]:
        """Begin another attempt, with the tokens so far: prefilled like the prompt, still counted as output."""
        if row.reason is not None:
            return []
        if row.full:
            return self.end(row, row.last or "length", now)
        actions = self.close(row)
        if row.attempt >= self.limits.max_attempts:
            return [*actions, *self.end(row, "error", now, f"given up after {row.attempt} attempts: {why}")]
        self.counters["restarts"] += 1
        if self._load_at == now and row.prefill is not None:
            self._load[row.prefill] = self._load.get(row.prefill, 0) - row.outstanding
        row.attempt += 1
        row.prefill = row.decode = row.finished = None
        row.move(Stage.QUEUED, now)
        return [*actions, *self.place(row, now)]

    def end(self, row: Row, reason: str, now: float, error: str | None = None) -> list[Action]:
        """The request is over: workers let go, the last words are asked for, `_worded` closes the row."""
        if row.reason is not None or row.stage.ended:
            return []
        row.reason, row.error = reason, error
        return [*self.close(row), *self.desk.word(row, final=True)]

    def close(self, row: Row) -> list[Action]:
        holders = dict.fromkeys(iid for iid in (row.prefill, row.decode) if iid is not None)
        return [Send(iid, Close(rid=row.rid, attempt=row.attempt)) for iid in holders]

    def not_held(self, row: Row, iid: str, now: float) -> list[Action]:
        if row.holder == row.decode or row.full:
            return self.restart(row, f"{iid} does not hold it any more", now)
        late = now - row.assigned_at > 2 * self.limits.beat_s
        return [self.assign(row, now)] if late else []  # it may still be on its way

    def restart_all(self, iid: str, why: str, now: float) -> list[Action]:
        return [a for row in self.table.held_by(iid) for a in self.restart(row, why, now)]

    def stage(self, row: Row, stage: Stage, iid: str, now: float) -> list[Action]:
        """All KV has landed at `iid`: from now on it answers for the request, the prefill side may forget it."""
        actions: list[Action] = []
        if stage.ended:  # only the broker ends a row
            return actions
        if stage in (Stage.WAITING, Stage.DECODE) and row.decode is None:
            row.decode = iid
            if row.prefill not in (None, iid):
                actions.append(Send(row.prefill, Close(rid=row.rid, attempt=row.attempt)))
        row.advance(stage, now)
        return actions

    def resend(self, row: Row, iid: str) -> Action:
        self.counters["resends"] += 1
        return Send(iid, Resend(rid=row.rid, attempt=row.attempt, start=len(row.output)))

    def finish(self, row: Row, now: float) -> list[Action]:
        for what in ("deadline", "patience", "retry"):
            self.timers.clear((what, row.rid))
        self.timers.set(("forget", row.rid), now + self.limits.client_grace_s)
        self.counters[f"ended_{row.reason}"] += 1
        return self.desk.finish(row, now)
