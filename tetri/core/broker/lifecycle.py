"""The lifecycle of requests: placement, stages, restarts and ends, driven by the reports of workers."""

from __future__ import annotations

from collections import Counter

from tetri.core.actions import Action, Send
from tetri.core.broker.closes import Closes
from tetri.core.broker.delivery import Delivery
from tetri.core.broker.membership import Member, Members
from tetri.core.broker.readiness import PairChecks
from tetri.core.broker.requests import BEFORE_TOKENS, ON_DECODER, Row
from tetri.core.broker.suspects import (
    SUSPECT_DEATHS,
    away_from,
    clear,
    count,
    is_guilty,
    is_suspect,
    lost_with,
    verdict,
)
from tetri.core.timers import Timers
from tetri.cost import Cost
from tetri.policy.breaker import Breaker
from tetri.policy.rules import PREFILL_ROUTES, Rules
from tetri.request import Stage, token_ids
from tetri.wire.messages import Assign, Close, Failed, Heartbeat, LoneStep, Proceed, Resend, Staged, TokenItem

BY_ITSELF = ("stop", "length")  # end reasons that come from the output itself, not from outside
TOKEN_S = 1e-6  # seconds per prompt token if the cost table is empty: queues are then compared by their tokens
LONGEST_S = 10.0  # the longest pause between two requests that try a failing prefill instance again
VERDICT_S = 1.0  # a worker whose connection broke and that is not back by then has died
MOST_LOST = 4  # a request ends after so many times `max_attempts`, even if its attempts were lost with their workers
SHORT_S, LONG_S = 1e-9, 1e9  # bounds of the predicted work, so that a sum in nanoseconds is neither 0 nor endless


class Lifecycle:
    """Moves requests through their stages. Shares the broker's members, delivery (and its table), timers and counters.

    The routing policy chooses a prefill instance by the predicted seconds of prefill work that are assigned to it and
    not done; `cost` and `chunk_tokens` predict them. The `breaker` has the prefill instances whose KV no decode
    instance could read: while there are others, they get a request now and then only."""

    def __init__(
        self,
        rules: Rules,
        members: Members,
        delivery: Delivery,
        cost: Cost,
        chunk_tokens: int,
        timers: Timers[tuple[str, str]],
        counters: Counter[str],
    ) -> None:
        self.members, self.delivery, self.timers, self.counters = members, delivery, timers, counters
        self.table, self.limits, self.rng = delivery.table, delivery.limits, delivery.rng
        self.cost, self.chunk_tokens = cost, chunk_tokens
        self.closes = Closes(members)
        self.pair_checks = PairChecks(members, self.closes, self.limits.ready_s)
        self._route = PREFILL_ROUTES[rules.prefill_route]
        self.breaker = Breaker(self.rng, LONGEST_S)
        self._probes = 0

    def place(self, row: Row, now: float) -> list[Action]:
        """Assign a request to a prefill instance. If none can take it, start its `patience_s` timer; if its output
        has outgrown every prefill instance, end it with an error."""
        tokens = len(row.prompt) + len(row.output)
        pool = self.members.pool(tokens, self.table.work_ns)
        work_s = self.cost.prompt_s(tokens, 0, self.chunk_tokens) or tokens * TOKEN_S
        work_s = min(max(work_s, SHORT_S), LONG_S)
        failing = self.breaker.failing if row.avoid else self.breaker.blocked(now)
        choices = away_from([*row.avoid, *lost_with(row), *failing], pool)
        column = self._route(work_s, choices, self.rng) if pool.iids else None
        if column is None:
            beyond = self.members.beyond(tokens) if row.attempt > 1 else None
            if beyond is not None:
                return self.end(row, "error", now, beyond)
            if ("patience", row.rid) not in self.timers:  # a further failed try does not extend the wait
                self.timers.set(("patience", row.rid), now + self.limits.patience_s)
            return []
        iid = choices.iids[column]
        pool.last = pool.iids.index(iid)
        self.table.assign(row, iid, round(1e9 * work_s))
        if iid in self.breaker.failing:
            self._probes += 1
            row.probe = self._probes
            self.breaker.probe(iid, row.probe)
        self.timers.clear(("patience", row.rid))
        return [self.assign(row, now)]

    def assign(self, row: Row, now: float) -> Action:
        """The Assign message to the row's prefill instance."""
        row.assigned_after = self.members.serial
        assert row.prefill is not None
        assign = Assign(
            rid=row.rid,
            attempt=row.attempt,
            prompt=row.prompt.tolist(),
            output=row.output.tolist(),
            sampling=row.sampling,
            deadline_s=row.left(now),
            alone=is_suspect(row),
            lost=lost_with(row),
            avoid=list(row.avoid),
        )
        return Send(row.prefill, assign)

    def place_waiting(self, now: float) -> list[Action]:
        """Try to place every request that has no prefill instance."""
        rows = [row for row in self.table.unplaced.values() if row.reason is None and not row.accused]
        return [action for row in rows for action in self.place(row, now)]

    def restart(self, row: Row, why: str, now: float) -> list[Action]:
        """Start another attempt. The tokens so far are prefilled like the prompt and still count as output. After
        `max_attempts` attempts that count, the request ends with an error instead."""
        if row.reason is not None:
            return []
        self._probed(row)
        actions = self.close(row)
        most = self.limits.max_attempts
        if row.attempt - row.not_counted >= most or row.attempt >= MOST_LOST * most:
            not_counted = f" ({row.not_counted} lost with their workers)" if row.not_counted else ""
            why = f"given up after {row.attempt} attempts{not_counted}: {why}"
            return [*actions, *self.end(row, "error", now, why)]
        self.counters["restarts"] += 1
        self.table.start_over(row, now)
        return [*actions, *self.place(row, now)]

    def end(self, row: Row, reason: str, now: float, error: str | None = None) -> list[Action]:
        """Set the end reason and ask for the remaining text, in which a stop text may still be found. When the text
        arrives, `finish` closes the row."""
        if row.reason is not None or row.stage.ended:
            return []
        row.reason, row.error = reason, error
        return self.delivery.detokenize(row, final=True)

    def close(self, row: Row) -> list[Action]:
        """Tell both workers to drop the request. If it ended by itself, they also get its output length to learn
        from, unless `ignore_eos` fixed that length."""
        holders = dict.fromkeys(iid for iid in (row.prefill, row.decode) if iid is not None)
        learn = row.reason in BY_ITSELF and not row.sampling.ignore_eos
        outputs = len(row.output) if learn else 0
        close = Close(rid=row.rid, attempt=row.attempt, outputs=outputs, reason=row.reason or "")
        return [self.closes.send(iid, close) for iid in holders]

    def not_held(self, row: Row, iid: str, read: int, now: float) -> list[Action]:
        """Handle a heartbeat of `iid`, which has read Membership `read`, that does not list a request assigned to it:
        restart a request with a token of this attempt, assign any other again. A second prefill in the same attempt
        could write another first token, and a decode instance may hold the KV of the first one."""
        if row.holder == row.decode or len(row.output) > row.continued:
            return self.restart(row, f"{iid} does not hold it any more", now)
        return [self.assign(row, now)] if row.assigned_after < read else []  # else it may still be on its way

    def restart_all(self, lost: Member, why: str, now: float) -> list[Action]:
        """Restart every request that a lost worker held, except one that has killed it: that one ends."""
        self.closes.forget(lost.iid)
        self.breaker.failing.pop(lost.iid, None)  # it may be well when it comes back
        actions = self.pair_checks.forget(lost.iid)
        for row in [row for row in self.table.held_by(lost.iid).values() if row.reason is None]:
            actions += self._restart_lost(row, lost, why, now)
        return actions

    def back(self, member: Member, now: float) -> list[Action]:
        """A lost worker is back as the same process."""
        clear(self.table.active(), member.iid, member.instance.incarnation)
        cleared = [row for row in self.table.active() if row.accused and len(row.deaths) < self.limits.max_deaths]
        for row in cleared:
            row.accused = False
        return [action for row in cleared if row.reason is None for action in self.place(row, now)]

    def judge(self, row: Row, now: float) -> list[Action]:
        """End an accused request, unless it was cleared meanwhile."""
        if not row.accused or row.reason is not None:
            return []
        self.counters["guilty"] += 1
        return self.end(row, "error", now, verdict(row))

    def _restart_lost(self, row: Row, lost: Member, why: str, now: float) -> list[Action]:
        count(row, lost.iid, lost.instance.incarnation)
        row.not_counted += 1
        if not is_guilty(row, lost.alone, self.limits.max_deaths):
            return self.restart(row, why, now)
        row.accused = True
        self.timers.set(("verdict", row.rid), now + VERDICT_S)
        closed = self.close(row)
        self.table.start_over(row, now)
        return closed

    def _lost_after_all(self, row: Row, event: Staged | Failed, now: float) -> list[Action]:
        """A decode instance was lost to which, as far as the broker knew, the request had not gone yet. If it has gone
        on elsewhere (Staged), in company, it starts over only as a suspect, which must be alone."""
        lost = self.members.by_iid.get(event.lost)
        if lost is None:
            return self.restart(row, f"{event.lost} was lost", now) if isinstance(event, Failed) else []
        if isinstance(event, Failed) or len(row.deaths) + 1 >= SUSPECT_DEATHS:
            return self._restart_lost(row, lost, f"{event.lost} was lost with its KV", now)
        count(row, lost.iid, lost.instance.incarnation)
        return []

    def lone_step(self, event: LoneStep, member: Member, now: float) -> list[Action]:
        """A worker is about to compute a suspect alone, or has done so. It waits for the answer."""
        proceed = Send(event.iid, Proceed(rid=event.rid, attempt=event.attempt, number=event.number))
        member.alone = None
        if event.over:
            return [proceed]
        row = self._row(event.rid, event.attempt)
        actions = [] if row is None else self.stage(row, event.stage, event.iid, now)
        if row is None or row.holder != event.iid:
            return actions or [self.closes.send(event.iid, Close(rid=event.rid, attempt=event.attempt))]
        member.alone = (row.rid, row.attempt)
        return [*actions, proceed]

    def stage(self, row: Row, stage: Stage, iid: str, now: float) -> list[Action]:
        """Move a request to a stage that `iid` reports. From WAITING on, all KV has landed at `iid`: the first instance
        to say so holds the request from then on, and the prefill instance may drop it. Another one may say so too, if
        a Landed was lost and the request was offered to it as well: it must stop."""
        actions: list[Action] = []
        if stage.ended:  # only the broker ends a row
            return actions
        if stage in ON_DECODER:
            if row.decode is None:
                if row.prefill in self.breaker.failing:
                    self.breaker.succeeded(row.prefill)
                self.table.hand_over(row, iid)
                if row.prefill is not None:
                    self.pair_checks.carried(row.prefill, iid, now)
                if row.prefill not in (None, iid):
                    actions.append(self._close_at(row.prefill, row))
            elif row.decode != iid:
                self.counters["decodes_refused"] += 1
                return [self._close_at(iid, row)]
        self.table.advance(row, stage, now)
        return actions

    def _close_at(self, iid: str, row: Row) -> Action:
        """Tell an instance to drop this attempt of a request, which continues elsewhere."""
        return self.closes.send(iid, Close(rid=row.rid, attempt=row.attempt))

    def resend(self, row: Row, iid: str) -> Action:
        """Ask `iid` for the output tokens that the row lacks."""
        self.counters["resends"] += 1
        return Send(iid, Resend(rid=row.rid, attempt=row.attempt, start=len(row.output)))

    def finish(self, row: Row, now: float) -> list[Action]:
        """Close the row: tell the workers to drop the request and send the client its Done."""
        for what in ("deadline", "patience", "verdict"):
            self.timers.clear((what, row.rid))
        self._probed(row)
        self.counters[f"ended_{row.reason}"] += 1
        actions = [*self.close(row), *self.delivery.finish(row, now)]
        self.timers.set(("forget", row.rid), now + self.limits.client_grace_s)
        return actions

    def remember(self, row: Row, now: float) -> None:
        """Keep an ended row for another `client_grace_s`: its Done was just sent and may get lost. `patience_s` after
        the end the time is no longer extended."""
        if row.stage.ended and now - row.stage_at < self.limits.patience_s:
            self.timers.set(("forget", row.rid), now + self.limits.client_grace_s)

    # ------------------------------------------------------------ what workers report

    def tokens(self, item: TokenItem, iid: str, now: float, actions: list[Action]) -> None:
        """Add the output tokens that `iid` reports to their row. Appends to `actions`, since this runs for every token
        of every request."""
        row = self._row(item.rid, item.attempt)
        if row is None:
            actions += self.pair_checks.tokens(item, iid, now)
            return
        if row.decode != iid and not self._may_write(row, item, iid, now, actions):
            return
        have, ids, start = len(row.output), item.ids, item.start
        if start > have:
            actions.append(self.resend(row, iid))
            return
        if start != have or have + len(ids) > row.sampling.max_tokens:
            ids = ids[have - start :][: row.sampling.max_tokens - have]
        if not ids and item.end is None:
            return
        row.output.extend(token_ids(ids))
        if ids and row.first_at is None:
            row.first_at = now
        if row.decode is None and row.stage in BEFORE_TOKENS:
            self.table.advance(row, Stage.MOVING, now)
        if item.end is not None:
            row.end = item.end
            actions += self.end(row, item.end.reason, now, item.end.error)
        elif len(row.output) == row.sampling.max_tokens:  # the worker should have sent an end
            actions += self.end(row, "length", now)
        else:
            actions += self.delivery.detokenize(row, final=False)

    def _may_write(self, row: Row, item: TokenItem, iid: str, now: float, actions: list[Action]) -> bool:
        """Whether tokens count of an instance that is not known to decode the request.

        The prefill instance may write the first token of the attempt. Any other token shows that all KV has landed at
        `iid`. So if no instance decodes the request yet, that one does: its Staged was lost. Otherwise it must stop."""
        if iid == row.prefill and item.start + len(item.ids) <= row.continued + 1:
            if row.decode is None or item.end is None:
                return True
        elif self.members.by_iid[iid].lost is not None:
            return False  # it says so again when it is back
        actions += self.stage(row, Stage.DECODE, iid, now)
        return row.decode == iid

    def moved(self, event: Staged | Failed, now: float) -> list[Action]:
        """A worker reports that a request has entered a stage, or cannot go on there."""
        row = self._row(event.rid, event.attempt)
        if row is None:
            return self.pair_checks.moved(event, now)
        if isinstance(event, Staged) and not event.lost:
            return self.stage(row, event.stage, event.iid, now)
        if row.holder != event.iid:
            return []  # another instance holds the request by now
        if event.lost:
            return self._lost_after_all(row, event, now)
        assert isinstance(event, Failed)
        if not event.retry:
            return self.end(row, "error", now, event.why)
        row.avoid = [*dict.fromkeys([*row.avoid, *event.avoid])]
        if event.iid in event.avoid:
            self.breaker.failed(event.iid, row.probe, event.why, now)
        return self.restart(row, event.why, now)

    def reconcile(self, heartbeat: Heartbeat, now: float) -> list[Action]:
        """Compare the requests in a worker's heartbeat, if it lists them, with the request table and repair every
        difference."""
        actions: list[Action] = []
        if heartbeat.holds is None:
            return actions
        iid, read = heartbeat.iid, self.members.read(heartbeat)
        self.closes.read(iid, read)
        held: dict[str, None] = {}
        for hold in heartbeat.holds:
            row = self._row(hold.rid, hold.attempt)
            if row is None:
                actions += [] if self.pair_checks.held(hold, iid, now) else self.closes.repeat(iid, hold)
                continue
            held[hold.rid] = None
            if row.decode not in (None, iid):
                actions += self.closes.repeat(iid, hold)
                continue
            if hold.stage in ON_DECODER and hold.stage is not row.stage:
                actions += self.stage(row, hold.stage, iid, now)
            if hold.outputs > len(row.output) or hold.stage is Stage.DONE:
                actions.append(self.resend(row, iid))
        missing = [row for rid, row in self.table.held_by(iid).items() if rid not in held and row.reason is None]
        for row in missing:
            actions += self.not_held(row, iid, read, now)
        return actions

    def _probed(self, row: Row) -> None:
        """Record that this attempt tries its prefill instance no longer, with whatever result."""
        if row.probe and row.prefill in self.breaker.failing:
            self.breaker.ended(row.prefill, row.probe)
        row.probe = 0

    def _row(self, rid: str, attempt: int) -> Row | None:
        """The open row of a worker's report; None if the request or this attempt is over, or no worker is assigned."""
        row = self.table.rows.get(rid)
        return row if row and row.attempt == attempt and row.reason is None and row.prefill else None
