"""The life of a request in the broker: placed, started over, moved on, ended."""

from __future__ import annotations

from collections import Counter
from random import Random

from tetri.core.actions import Action, Send
from tetri.core.broker.delivery import Delivery, Limits
from tetri.core.broker.membership import Members
from tetri.core.broker.requests import BEFORE_TOKENS, IDLE, ON_DECODER, Row, Table
from tetri.core.timers import Timers
from tetri.cost import Cost
from tetri.policy.rules import PREFILL_ROUTES, Rules
from tetri.request import Stage
from tetri.wire.messages import Assign, Close, Failed, Heartbeat, Resend, Staged, TokenItem

BY_ITSELF = ("stop", "length")  # reasons of an end that is the text's own
TOKEN_S = 1e-6  # per prompt token where the cost table is empty: queues are then compared by their tokens
SHORT_S, LONG_S = 1e-9, 1e9  # what a cost table may say beyond these is no work that a sum of nanoseconds could count


class Lifecycle:
    """Shares the broker's request table, members, delivery, timers and counters. A prefill instance is chosen by the predicted
    seconds of all prefill that it was given and has not done; `cost` and `chunk_tokens` predict them."""

    def __init__(
        self,
        limits: Limits,
        rules: Rules,
        table: Table,
        members: Members,
        delivery: Delivery,
        rng: Random,
        cost: Cost,
        chunk_tokens: int,
        timers: Timers[tuple[str, str]],
        counters: Counter[str],
    ) -> None:
        self.limits, self.rng, self.timers, self.counters = limits, rng, timers, counters
        self.table, self.members, self.delivery = table, members, delivery
        self.cost, self.chunk_tokens = cost, chunk_tokens
        self._route = PREFILL_ROUTES[rules.prefill_route]

    def place(self, row: Row, now: float) -> list[Action]:
        tokens = len(row.prompt) + len(row.output)
        pool = self.members.pool(tokens, self.table.work_ns)
        work_s = self.cost.prompt_s(tokens, 0, self.chunk_tokens) or tokens * TOKEN_S
        work_s = min(max(work_s, SHORT_S), LONG_S)
        column = self._route(work_s, pool, self.rng) if pool.iids else None
        if column is None:
            beyond = self.members.beyond(tokens) if row.attempt > 1 else None
            if beyond is not None:
                return self.end(row, "error", now, beyond)
            if ("patience", row.rid) not in self.timers:  # or whoever comes in vain would prolong it
                self.timers.set(("patience", row.rid), now + self.limits.patience_s)
            return []
        pool.last = column
        self.table.assign(row, pool.iids[column], round(1e9 * work_s))
        self.timers.clear(("patience", row.rid))
        return [self.assign(row, now)]

    def assign(self, row: Row, now: float) -> Action:
        row.assigned_at = now
        assert row.prefill is not None
        assign = Assign(
            rid=row.rid,
            attempt=row.attempt,
            prompt=list(row.prompt),
            output=list(row.output),
            sampling=row.sampling,
            deadline_s=row.left(now),
        )
        return Send(row.prefill, assign)

    def place_waiting(self, now: float) -> list[Action]:
        rows = [row for row in self.table.unplaced.values() if row.reason is None]
        return [action for row in rows for action in self.place(row, now)]

    def restart(self, row: Row, why: str, now: float) -> list[Action]:
        """Begin another attempt, with the tokens so far: prefilled like the prompt, still counted as output."""
        if row.reason is not None:
            return []
        actions = self.close(row)
        if row.attempt - row.not_counted >= self.limits.max_attempts:
            not_counted = f" ({row.not_counted} lost while it only waited)" if row.not_counted else ""
            return [
                *actions,
                *self.end(row, "error", now, f"given up after {row.attempt} attempts{not_counted}: {why}"),
            ]
        self.counters["restarts"] += 1
        self.table.start_over(row, now)
        return [*actions, *self.place(row, now)]

    def end(self, row: Row, reason: str, now: float, error: str | None = None) -> list[Action]:
        """The request is over: the last words are asked for, in which a stop text may still be found; once they are
        here, `finish` closes the row."""
        if row.reason is not None or row.stage.ended:
            return []
        row.reason, row.error = reason, error
        return self.delivery.detokenize(row, final=True)

    def close(self, row: Row) -> list[Action]:
        """Both workers let go. When it is over, they learn from how much it wrote, unless that was what its request
        fixed."""
        holders = dict.fromkeys(iid for iid in (row.prefill, row.decode) if iid is not None)
        learn = row.reason in BY_ITSELF and not row.sampling.ignore_eos
        outputs = len(row.output) if learn else 0
        close = Close(rid=row.rid, attempt=row.attempt, outputs=outputs, reason=row.reason or "")
        return [Send(iid, close) for iid in holders]

    def not_held(self, row: Row, iid: str, now: float) -> list[Action]:
        if row.holder == row.decode:
            return self.restart(row, f"{iid} does not hold it any more", now)
        late = now - row.assigned_at > 2 * self.limits.heartbeat_s
        return [self.assign(row, now)] if late else []  # it may still be on its way

    def restart_all(self, iid: str, why: str, now: float) -> list[Action]:
        """The worker is lost, and all that it held begins anew. It may have died of what it was working on; what only
        waited there did nothing to it, and its attempt does not count. Where nothing is known to have been worked on,
        the news of it may be lost: then all count, so that what kills at once does not do so for ever."""
        rows = [row for row in self.table.held_by(iid).values() if row.reason is None]
        worked = any(row.stage not in IDLE for row in rows)
        actions: list[Action] = []
        for row in rows:
            row.not_counted += worked and row.stage in IDLE
            actions += self.restart(row, why, now)
        return actions

    def stage(self, row: Row, stage: Stage, iid: str, now: float) -> list[Action]:
        """All KV has landed at `iid`: from now on it answers for the request, the prefill side may forget it."""
        actions: list[Action] = []
        if stage.ended:  # only the broker ends a row
            return actions
        if stage in (Stage.WAITING, Stage.DECODE) and row.decode is None:
            self.table.hand_over(row, iid)
            if row.prefill not in (None, iid):
                actions.append(Send(row.prefill, Close(rid=row.rid, attempt=row.attempt)))
        self.table.advance(row, stage, now)
        return actions

    def resend(self, row: Row, iid: str) -> Action:
        self.counters["resends"] += 1
        return Send(iid, Resend(rid=row.rid, attempt=row.attempt, start=len(row.output)))

    def finish(self, row: Row, now: float) -> list[Action]:
        """Workers let go, the client gets its Done."""
        for what in ("deadline", "patience", "retry"):
            self.timers.clear((what, row.rid))
        self.counters[f"ended_{row.reason}"] += 1
        actions = [*self.close(row), *self.delivery.finish(row, now)]
        self.remember(row, now)
        return actions

    def remember(self, row: Row, now: float) -> None:
        """Keep an ended row for the grace from now on, as somebody has just been sent its end, which may get lost
        as all messages may; but not for ever."""
        if row.stage.ended and now - row.stage_at < self.limits.patience_s:
            self.timers.set(("forget", row.rid), now + self.limits.client_grace_s)

    # ------------------------------------------------------------ what workers report

    def tokens(self, item: TokenItem, iid: str, now: float, actions: list[Action]) -> None:
        """Add the output tokens that `iid` reports to their row. Appends to `actions`, since this runs for every token
        of every request."""
        row = self._row(item.rid, item.attempt)
        if row is None:
            return
        have, ids, start = len(row.output), item.ids, item.start
        if start > have:
            actions.append(self.resend(row, iid))
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
            actions += self.end(row, item.end.reason, now)
        elif len(row.output) == row.sampling.max_tokens:  # its worker should have said so
            actions += self.end(row, "length", now)
        else:
            actions += self.delivery.detokenize(row, final=False)

    def moved(self, event: Staged | Failed, now: float) -> list[Action]:
        """A worker reports that a request has entered a stage, or cannot go on there."""
        row = self._row(event.rid, event.attempt)
        match event:
            case _ if row is None:
                return []
            case Staged():
                return self.stage(row, event.stage, event.iid, now)
            case Failed() if row.holder != event.iid:
                return []  # another instance has it all by now
            case Failed(retry=True):
                return self.restart(row, event.why, now)
        return self.end(row, "error", now, event.why)

    def reconcile(self, heartbeat: Heartbeat, now: float) -> list[Action]:
        """Compare what a worker holds with what the request table says it holds, and make both sides agree."""
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
                actions += self.stage(row, hold.stage, iid, now)
            if row.decode is not None and row.decode != iid and hold.stage is not Stage.DONE:
                actions.append(Send(iid, Close(rid=hold.rid, attempt=hold.attempt)))
            elif hold.outputs > len(row.output) or hold.stage is Stage.DONE:
                actions.append(self.resend(row, iid))
        missing = [row for rid, row in self.table.held_by(iid).items() if rid not in held and row.reason is None]
        for row in missing:
            actions += self.not_held(row, iid, now)
        return actions

    def _row(self, rid: str, attempt: int) -> Row | None:
        """The open row that a worker speaks of, None when it is over, this attempt is, or nobody can have it."""
        row = self.table.rows.get(rid)
        return row if row and row.attempt == attempt and row.reason is None and row.prefill else None
