"""The lifecycle of choices: placement, stages, restarts and ends, driven by the reports of workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from tetri.core.actions import Action, Send
from tetri.core.broker.closes import Closes
from tetri.core.broker.costs import Costs
from tetri.core.broker.delivery import Delivery
from tetri.core.broker.groups import given_up_together, sharing_a_prefill
from tetri.core.broker.membership import Member, Members
from tetri.core.broker.migrations import Migrations
from tetri.core.broker.observer import StepTokens
from tetri.core.broker.readiness import PairChecks
from tetri.core.broker.requests import BEFORE_TOKENS, ON_DECODER, Choice, Request
from tetri.core.broker.slo import left, seconds_left
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
from tetri.policy.breaker import Breaker
from tetri.policy.rules import PREFILL_ROUTES, Rules
from tetri.request import Stage
from tetri.wire.handover import Sibling
from tetri.wire.messages import (
    Assign,
    Close,
    Failed,
    Heartbeat,
    LoneStep,
    NotMigrated,
    Proceed,
    Resend,
    Staged,
    TokenItem,
    Tokens,
)

BY_ITSELF = ("stop", "length")  # end reasons that come from the output itself, not from outside
LONGEST_S = 10.0  # the longest pause between two requests that try a failing prefill instance again
VERDICT_S = 1.0  # a worker whose connection broke and that is not back by then has died
MOST_LOST = 4  # a request ends after so many times `max_attempts`, even if its attempts were lost with their workers
SHORT_S, LONG_S = 1e-9, 1e9  # bounds of the predicted work, so that a sum in nanoseconds is neither 0 nor endless


class Lifecycle:
    """Moves choices through their stages. Shares the broker's members, delivery (and its table and observer), timers
    and counters.

    The routing policy chooses a prefill instance by the predicted seconds of prefill work that are assigned to it and
    not done; `costs` predict them. Choices of a request that have no output yet are placed together:
    one prefill serves them. The `breaker` has the prefill instances whose KV no decode instance could read: while there
    are others, they get a request now and then only."""

    def __init__(
        self,
        rules: Rules,
        members: Members,
        delivery: Delivery,
        costs: Costs,
        timers: Timers[tuple[str, str]],
        counters: Counter[str],
    ) -> None:
        self.members, self.delivery, self.timers, self.counters = members, delivery, timers, counters
        self.table, self.limits, self.rng = delivery.table, delivery.limits, delivery.rng
        self.observer = delivery.observer
        self.costs = costs
        self.closes = Closes(members)
        self.pair_checks = PairChecks(members, self.closes, self.limits.ready_s)
        self.migrations = Migrations(rules.migrate, self.table, members, self.observer, self.closes, counters)
        self._route = PREFILL_ROUTES[rules.prefill_route]
        self.breaker = Breaker(self.rng, LONGEST_S)
        self._probes = 0

    def place(self, choices: Sequence[Choice], now: float) -> list[Action]:
        """Assign a choice, or several that share a prefill, to a prefill instance. If none can take it, start their
        `patience_s` timers; if an output has outgrown every prefill instance, end it with an error."""
        lead, request = choices[0], choices[0].request
        tokens = len(request.prompt) + len(lead.output)
        pool = self.members.pool(tokens, self.table)
        work_s = min(max(self.costs.work_s(tokens), SHORT_S), LONG_S)
        pool.ttft_s = seconds_left(lead, now)
        failing = self.breaker.failing if request.avoid else self.breaker.blocked(now)
        allowed = away_from([*request.avoid, *request.gave_up, *lost_with(request), *failing], pool)
        column = self._route(work_s * self.costs.cost.prefill, allowed, self.rng) if pool.iids else None
        if column is None:
            beyond = self.members.beyond(tokens) if lead.attempt > 1 else None
            if beyond is not None:
                return self.end_all(choices, "error", now, beyond)
            for choice in choices:
                if ("patience", choice.id) not in self.timers:  # a further failed try does not extend the wait
                    self.timers.set(("patience", choice.id), now + self.limits.patience_s)
            return []
        iid = allowed.iids[column]
        pool.last = column if allowed is pool else pool.iids.index(iid)
        if iid in self.breaker.failing:
            self._probes += 1
            self.breaker.probe(iid, self._probes)
        self.observer.placed(choices, allowed.queued_s[column])
        share_ns = max(1, round(1e9 * work_s / len(choices)))
        for choice in choices:
            self.table.assign(choice, iid, share_ns, now)
            choice.probe = self._probes if iid in self.breaker.failing else 0
            self.timers.clear(("patience", choice.id))
        return [self.assign(choices, now)]

    def assign(self, choices: Sequence[Choice], now: float) -> Action:
        """The Assign message to the prefill instance of choices that share a prefill."""
        lead, request = choices[0], choices[0].request
        for choice in choices:
            choice.assigned_after = self.members.serial
        assert lead.prefill is not None
        assign = Assign(
            rid=lead.id,
            attempt=lead.attempt,
            prompt=request.prompt.tolist(),
            output=lead.output.tolist(),
            sampling=lead.sampling,
            deadline_s=request.left(now),
            alone=is_suspect(request),
            lost=lost_with(request),
            avoid=list(request.avoid),
            siblings=[Sibling(each.id, each.attempt, each.sampling.seed or 0) for each in choices[1:]],
            slo=left(lead, now),
        )
        return Send(lead.prefill, assign)

    def place_waiting(self, now: float) -> list[Action]:
        """Try to place every choice that has no prefill instance."""
        return self._place_all([*self.table.unplaced.values()], now)

    def _place_all(self, choices: Iterable[Choice], now: float) -> list[Action]:
        """Place choices, those of a request that have no output together, if a decode instance can take so many."""
        actions: list[Action] = []
        for group in sharing_a_prefill([each for each in choices if each.reason is None and not each.request.accused]):
            alone = len(group) > 1 and self.members.too_many(len(group[0].request.prompt), len(group))
            for part in [[choice] for choice in group] if alone else [group]:
                actions += self.place(part, now)
        return actions

    def restart(self, choices: Iterable[Choice], reason: str, why: str, now: float) -> list[Action]:
        """Start another attempt, for one of the reasons of `retries` (docs/metrics.md). The tokens so far are prefilled
        like the prompt and still count as output. After `max_attempts` attempts that count, a choice ends with an error
        instead."""
        actions: list[Action] = []
        again = []
        most = self.limits.max_attempts
        for choice in choices:
            if choice.reason is not None:
                continue
            self._probed(choice)
            actions += self.close(choice)
            if choice.attempts - choice.not_counted >= most or choice.attempts >= MOST_LOST * most:
                not_counted = f" ({choice.not_counted} lost with their workers)" if choice.not_counted else ""
                given_up = f"given up after {choice.attempts} attempts{not_counted}: {why}"
                actions += self.end(choice, "error", now, given_up)
                continue
            self.counters["restarts"] += 1
            self.table.start_over(choice, now)
            self.observer.retried(choice, reason, why, now)
            again.append(choice)
        return [*actions, *self._place_all(again, now)]

    def end_all(
        self, choices: Iterable[Choice], reason: str, now: float, error: str | None = None
    ) -> list[Action]:
        """As `end`, for several choices."""
        return [action for choice in choices for action in self.end(choice, reason, now, error)]

    def end(self, choice: Choice, reason: str, now: float, error: str | None = None) -> list[Action]:
        """Set the end reason and ask for the remaining text, in which a stop text may still be found. When the text
        arrives, `finish` closes the choice."""
        if choice.reason is not None or choice.stage.ended:
            return []
        choice.reason, choice.error = reason, error
        return [self.delivery.detokenize(choice, final=True)]

    def close(self, choice: Choice) -> list[Action]:
        """Tell both workers to drop the choice. If it ended by itself, they also get its output length to learn
        from, unless `ignore_eos` fixed that length."""
        moves_to = None if choice.move is None else choice.move.to
        self.migrations.over(choice)
        holders = dict.fromkeys(iid for iid in (choice.prefill, choice.decode, moves_to) if iid is not None)
        learn = choice.reason in BY_ITSELF and not choice.sampling.ignore_eos
        outputs = len(choice.output) if learn else 0
        close = Close(rid=choice.id, attempt=choice.newest, outputs=outputs, reason=choice.reason or "")
        return [self.closes.send(iid, close) for iid in holders]

    def _not_held(self, missing: list[Choice], iid: str, read: int, now: float) -> list[Action]:
        """Handle a heartbeat of `iid`, which has read Membership `read`, that does not list choices assigned to it:
        restart one with a token of this attempt, assign any other again. A second prefill in the same attempt could
        write another first token, and a decode instance may hold the KV of the first one."""
        lost = [each for each in missing if each.holder == each.decode or len(each.output) > each.continued]
        # Else it may still be on its way.
        again = [each for each in missing if each not in lost and each.assigned_after < read]
        restarted = self.restart(lost, "not_held", f"{iid} does not hold it any more", now)
        return [*restarted, *(self.assign(group, now) for group in sharing_a_prefill(again))]

    def restart_all(self, lost: Member, reason: str, why: str, now: float) -> list[Action]:
        """Restart every choice that a lost worker held, except those of a request that has killed it: that one ends."""
        self.closes.forget(lost.iid)
        self.breaker.failing.pop(lost.iid, None)  # it may be well when it comes back
        actions = [*self.pair_checks.forget(lost.iid), *self.migrations.lost(lost.iid)]
        held = [*self.table.held_by(lost.iid).values()]
        return [*actions, *self._restart_lost(held, lost, reason, why, now)]

    def back(self, member: Member) -> None:
        """A lost worker is back as the same process. `place_waiting` follows."""
        requests = [*dict.fromkeys(choice.request for choice in self.table.active())]
        clear(requests, member.iid, member.instance.incarnation)
        for request in requests:
            request.accused = request.accused and len(request.deaths) >= self.limits.max_deaths

    def judge(self, request: Request, now: float) -> list[Action]:
        """End an accused request, unless it was cleared meanwhile."""
        if not request.accused or all(choice.reason is not None for choice in request.choices):
            return []
        self.counters["guilty"] += 1
        self.observer.happened("killed", request.deaths[-1][0], f"{request.rid}: {verdict(request)}", now)
        return self.end_all(request.choices, "error", now, verdict(request))

    def _restart_lost(
        self, choices: Sequence[Choice], lost: Member, reason: str, why: str, now: float
    ) -> list[Action]:
        """Restart choices that were lost with a worker. Those of a request that is accused of it wait for the
        verdict."""
        choices = [choice for choice in choices if choice.reason is None]
        for request in dict.fromkeys(choice.request for choice in choices):
            count(request, lost.iid, lost.instance.incarnation)
            if is_guilty(request, lost.alone, self.limits.max_deaths):
                request.accused = True
                self.timers.set(("verdict", request.rid), now + VERDICT_S)
        for choice in choices:
            choice.not_counted += 1
        return self.restart(choices, reason, why, now)

    def _lost_after_all(self, choice: Choice, event: Staged | Failed, now: float) -> list[Action]:
        """A decode instance was lost to which, as far as the broker knew, the choice had not gone yet. If it has gone
        on elsewhere (Staged), in company, it starts over only as a suspect, which must be alone."""
        lost = self.members.by_iid.get(event.lost)
        if lost is None:
            why = f"{event.lost} was lost"
            return self.restart(given_up_together(choice), "kv_lost", why, now) if isinstance(event, Failed) else []
        if isinstance(event, Failed) or len(choice.request.deaths) + 1 >= SUSPECT_DEATHS:
            why = f"{event.lost} was lost with its KV"
            return self._restart_lost(given_up_together(choice), lost, "kv_lost", why, now)
        count(choice.request, lost.iid, lost.instance.incarnation)
        return []

    def lone_step(self, event: LoneStep, member: Member, now: float) -> list[Action]:
        """A worker is about to compute a suspect alone, or has done so. It waits for the answer."""
        proceed = Send(event.iid, Proceed(rid=event.rid, attempt=event.attempt, number=event.number))
        member.alone = None
        if event.over:
            return [proceed]
        choice = self._reported(event.rid, event.attempt)
        actions = [] if choice is None else self.stage(choice, event.stage, event.iid, now)
        if choice is None or choice.holder != event.iid:
            return actions or [self.closes.send(event.iid, Close(rid=event.rid, attempt=event.attempt))]
        member.alone = (choice.id, choice.attempt)
        return [*actions, proceed]

    def stage(self, choice: Choice, stage: Stage, iid: str, now: float) -> list[Action]:
        """Move a choice to a stage that `iid` reports. From WAITING on, all KV has landed at `iid`: the first instance
        to say so holds the choice from then on, and the prefill instance may drop it. Another one may say so too, if
        a Landed was lost and the choice was offered to it as well: it must stop."""
        actions: list[Action] = []
        if stage.ended:  # only the broker ends a choice
            return actions
        if stage in ON_DECODER:
            if choice.decode is None:
                if choice.prefill in self.breaker.failing:
                    self.breaker.succeeded(choice.prefill)
                    self.observer.happened("healed", choice.prefill, f"{iid} has read its KV", now)
                self.table.hand_over(choice, iid)
                self.observer.decodes(choice, iid, now)
                if choice.prefill is not None:
                    self.pair_checks.carried(choice.prefill, iid, now)
                if choice.prefill not in (None, iid):
                    actions.append(self._close_at(choice.prefill, choice))
            elif choice.decode != iid:
                self.counters["decodes_refused"] += 1
                return [self._close_at(iid, choice)]
        self.table.advance(choice, stage, now)
        return actions

    def _close_at(self, iid: str, choice: Choice) -> Action:
        """Tell an instance to drop this attempt of a choice, which continues elsewhere."""
        return self.closes.send(iid, Close(rid=choice.id, attempt=choice.attempt))

    def resend(self, choice: Choice, iid: str) -> Action:
        """Ask `iid` for the output tokens that the choice lacks."""
        self.counters["resends"] += 1
        return Send(iid, Resend(rid=choice.id, attempt=choice.attempt, start=len(choice.output)))

    def finish(self, choice: Choice, now: float) -> list[Action]:
        """Close the choice: tell the workers to drop it and send the client its Done."""
        self.timers.clear(("patience", choice.id))
        self._probed(choice)
        self.counters[f"ended_{choice.reason}"] += 1
        actions = [*self.close(choice), *self.delivery.finish(choice, now)]
        request = choice.request
        if request.ended:
            for what in ("deadline", "verdict"):
                self.timers.clear((what, request.rid))
            self.timers.set(("forget", request.rid), now + self.limits.client_grace_s)
        return actions

    def remember(self, request: Request, now: float) -> None:
        """Keep an ended request for another `client_grace_s`: a Done was just sent and may get lost. `patience_s` after
        the end the time is no longer extended."""
        if request.ended and now - request.ended_at < self.limits.patience_s:
            self.timers.set(("forget", request.rid), now + self.limits.client_grace_s)

    # ------------------------------------------------------------ what workers report

    def tokens(self, event: Tokens, member: Member, now: float) -> list[Action]:
        """Add the output tokens of an engine step to their choices."""
        actions: list[Action] = []
        step = self.observer.step(event, member, now)
        for item in event.items:
            self._add(item, event.iid, step, now, actions)
        step.close()
        return actions

    def _add(self, item: TokenItem, iid: str, step: StepTokens, now: float, actions: list[Action]) -> None:
        """Add the output tokens that `iid` reports to their choice. Appends to `actions`, since this runs for every
        token of every request."""
        choice = self.table.choices.get(item.rid)
        if choice and choice.move is not None:
            actions += self.migrations.landed(item.rid, item.attempt, iid, now)
        if not choice or choice.attempt != item.attempt or choice.reason is not None or not choice.prefill:
            actions += self.pair_checks.tokens(item, iid, now)  # as `_reported`, without a call
            return
        if choice.decode != iid and not self._may_write(choice, item, iid, now, actions):
            return
        have, ids, start = len(choice.output), item.ids, item.start
        if start > have:
            actions.append(self.resend(choice, iid))
            return
        if start != have or have + len(ids) > choice.sampling.max_tokens:
            ids = ids[have - start :][: choice.sampling.max_tokens - have]
        if not ids and item.end is None:
            return
        if not choice.extend(ids):
            actions += self.end(choice, "error", now, f"{iid} computes no log probabilities")
            return
        if ids:
            step.wrote(choice, len(ids))
        if choice.decode is None and choice.stage in BEFORE_TOKENS:
            self.table.advance(choice, Stage.MOVING, now)
        if item.end is not None:
            choice.end = item.end
            actions += self.end(choice, item.end.reason, now, item.end.error)
        elif len(choice.output) == choice.sampling.max_tokens:  # the worker should have sent an end
            actions += self.end(choice, "length", now)
        else:
            actions.append(self.delivery.detokenize(choice, final=False))

    def _may_write(self, choice: Choice, item: TokenItem, iid: str, now: float, actions: list[Action]) -> bool:
        """Whether tokens count of an instance that is not known to decode the choice.

        The prefill instance may write the first token of the attempt. Any other token shows that all KV has landed at
        `iid`. So if no instance decodes the choice yet, that one does: its Staged was lost. Otherwise it must stop."""
        if iid == choice.prefill and item.start + len(item.ids) <= choice.continued + 1:
            if choice.decode is None or item.end is None:
                return True
        elif self.members.by_iid[iid].lost is not None:
            return False  # it says so again when it is back
        actions += self.stage(choice, Stage.DECODE, iid, now)
        return choice.decode == iid

    def moved(self, event: Staged | Failed | NotMigrated, now: float) -> list[Action]:
        """A worker reports that a choice has entered a stage, or cannot go on there, or elsewhere."""
        lands = isinstance(event, Staged) and event.stage in ON_DECODER
        actions = self.migrations.landed(event.rid, event.attempt, event.iid, now) if lands else []
        choice = self._reported(event.rid, event.attempt)
        if isinstance(event, NotMigrated):
            return [] if choice is None else self.migrations.not_migrated(event, choice, now)
        if choice is None:
            return self.pair_checks.moved(event, now)
        if isinstance(event, Staged) and not event.lost:
            return [*actions, *self.stage(choice, event.stage, event.iid, now)]
        if choice.holder != event.iid:
            return []  # another instance holds the choice by now
        if event.lost:
            return self._lost_after_all(choice, event, now)
        assert isinstance(event, Failed)
        if not event.retry:
            return self.end(choice, "error", now, event.why)
        request = choice.request
        request.avoid = [*dict.fromkeys([*request.avoid, *event.avoid])]
        request.gave_up = [] if event.avoid else [event.iid]
        if event.iid in event.avoid:
            if event.iid not in self.breaker.failing:
                self.observer.happened("failing", event.iid, event.why, now)
            self.breaker.failed(event.iid, choice.probe, event.why, now)
        reason = "kv_unread" if event.avoid else "given_up"
        return self.restart(given_up_together(choice), reason, event.why, now)

    def reconcile(self, heartbeat: Heartbeat, now: float) -> list[Action]:
        """Compare the choices in a worker's heartbeat, if it lists them, with the request table and repair every
        difference."""
        actions: list[Action] = []
        if heartbeat.holds is None:
            return actions
        iid, read = heartbeat.iid, self.members.read(heartbeat)
        self.closes.read(iid, read)
        held: dict[str, None] = {}
        for hold in heartbeat.holds:
            if hold.stage is Stage.DONE or hold.stage in ON_DECODER:
                actions += self.migrations.landed(hold.rid, hold.attempt, iid, now)
            choice = self._reported(hold.rid, hold.attempt)
            if choice is None and self.migrations.awaits(hold, iid):
                continue
            if choice is None:
                actions += [] if self.pair_checks.held(hold, iid, now) else self.closes.repeat(iid, hold)
                continue
            held[hold.rid] = None
            if choice.decode not in (None, iid):
                actions += self.closes.repeat(iid, hold)
                continue
            if hold.stage in ON_DECODER and hold.stage is not choice.stage:
                actions += self.stage(choice, hold.stage, iid, now)
            actions += self.migrations.held(choice, hold, iid)
            if hold.outputs > len(choice.output) or hold.stage is Stage.DONE:
                actions.append(self.resend(choice, iid))
        assigned = self.table.held_by(iid).items()
        missing = [choice for name, choice in assigned if name not in held and choice.reason is None]
        return [*actions, *self._not_held(missing, iid, read, now)]

    def _probed(self, choice: Choice) -> None:
        """Record that this attempt tries its prefill instance no longer, with whatever result."""
        if choice.probe and choice.prefill in self.breaker.failing:
            self.breaker.ended(choice.prefill, choice.probe)
        choice.probe = 0

    def _reported(self, rid: str, attempt: int) -> Choice | None:
        """The open choice of a worker's report; None if it or this attempt is over, or no worker is assigned."""
        choice = self.table.choices.get(rid)
        return choice if choice and choice.attempt == attempt and choice.reason is None and choice.prefill else None
