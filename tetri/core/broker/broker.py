"""The broker's core. It places each request on a prefill instance, relays the tokens to the client, restarts the
request when a worker is lost, and carries out role changes. No single message has to arrive: a heartbeat states what
its worker holds and which role it has, and the broker repairs every difference from its own tables.
"""

from __future__ import annotations

from collections import Counter
from random import Random

from tetri.core.actions import (
    BROKER,
    Action,
    Broken,
    BrokerInput,
    Detokenized,
    FromClient,
    Reply,
    Submitted,
    Undelivered,
)
from tetri.core.broker.costs import EMPTY, Costs
from tetri.core.broker.delivery import ANOTHERS, RETRY_AFTER_S, Delivery, Limits, Problem, refuse
from tetri.core.broker.lifecycle import Lifecycle
from tetri.core.broker.membership import Member, Members
from tetri.core.broker.notes import notes
from tetri.core.broker.observer import Observer
from tetri.core.broker.requests import Request, Table, needed_bytes
from tetri.core.broker.roles import Flips
from tetri.core.broker.slo import Limiter
from tetri.core.timers import Timers
from tetri.cost import Cost
from tetri.policy.rules import Rules
from tetri.request import Sampling, Slo, choice_id
from tetri.wire.clients import (
    Attach,
    Cancel,
    ChangeRole,
    CheckReadiness,
    EndRequest,
    Explain,
    Inspect,
    MonitorStatus,
    Observe,
    Status,
)
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.messages import (
    ClusterView,
    Failed,
    FlipWanted,
    FromWorker,
    Heartbeat,
    LoneStep,
    NotMigrated,
    Ready,
    Staged,
    Tokens,
)

VIEW = ("view", "")
OLD_S = 2.0  # a view after which none has come for so long counts no more, as at the workers
SLOW_S = 1.0  # how often the broker looks whether a slow client has got the end of its request
NO_LIMITS = Slo()
NO_VIEW = ClusterView(epoch=0, number=0, loads=[])


class Broker:
    """Dispatches events to the request table, membership, delivery, lifecycle and role changes, which it owns."""

    def __init__(
        self,
        limits: Limits,
        rules: Rules,
        epoch: int,
        rng: Random,
        now: float,
        model: str = "",
        cost: Cost = EMPTY,
        chunk_tokens: int = 512,
        slo: Slo = NO_LIMITS,
    ) -> None:
        """`epoch` identifies this start of the broker. `cost` and `chunk_tokens` predict the prefill time of a prompt;
        an empty `cost` is replaced by what a worker announces. `slo`: the limits of latency of requests that name none.
        `now` is in seconds, as in all methods."""
        self.limits, self.model = limits, model
        self.costs = Costs(cost, chunk_tokens)
        self.limiter = Limiter(slo, self.costs.cost, chunk_tokens)
        self.observer = Observer(epoch, limits.timelines_mib)
        self.members = Members(epoch)
        self.table = Table(self.observer.moved, self.members.recount)
        self.delivery = Delivery(self.table, limits, rng, self.observer)
        self.timers: Timers[tuple[str, str]] = Timers()
        self.counters: Counter[str] = Counter()
        self.lifecycle = Lifecycle(rules, self.members, self.delivery, self.costs, self.timers, self.counters)
        self.pair_checks = self.lifecycle.pair_checks
        self.flips = Flips(self.members, self.counters, self.observer)
        self.seen: tuple[ClusterView, float] | None = None  # the newest cluster view and its time of arrival
        self.timers.set(VIEW, now)

    # ------------------------------------------------------------ the interface of a core

    def handle(self, event: BrokerInput, now: float) -> list[Action]:
        """Process one event. Raises Broken for an event that is not a BrokerInput."""
        match event:  # the most frequent first
            case Detokenized():
                return self._detokenized(event, now)
            case Ready():
                return self._ready(event, now)
            case FromWorker():
                return self._received(event, now)
            case Submitted():
                return self._submit(event, now)
            case FromClient():
                return self._client(event, now)
            case Undelivered():
                return self._undelivered(event, now)
            case FlipWanted():
                return [*self.flips.want(event, now), *self.lifecycle.place_waiting(now)]
            case ClusterView():
                self.seen = (event, now)
                self.members.viewed(event)
                return self.lifecycle.migrations.plan(event, now)
            case PeerUp():
                return self._up(event.peer, now)
            case PeerDown():
                return self._down(event.peer, now)
        raise Broken(f"the broker does not handle {event}")

    def tick(self, now: float) -> list[Action]:
        """Run every timer that is due."""
        actions: list[Action] = []
        for what, who in self.timers.due(now):
            if what == "view":
                self.timers.set(VIEW, now + self.limits.heartbeat_s)
                if not self.table.open:
                    self.check()
                if self.seen is not None and now - self.seen[1] > OLD_S:
                    self.members.viewed(NO_VIEW)
                self.costs.correct(self.members.by_iid.values())
                actions += [*self.members.prune(now), *self.members.refresh(now)]
            elif what == "silence":
                actions += self._silent(who, now)
            else:
                actions += self._request_timer(what, who, now)
        return [
            *actions,
            *self.members.publish_due(now),
            *self.delivery.connections.tick(now),
            *self.pair_checks.tick(now),
        ]

    def deadline(self) -> float | None:
        """The time of the next `tick`; None if no timer is set."""
        earliest, clients = self.timers.next(), self.delivery.connections.deadline()
        for at in (clients, self.members.publish_at(), self.pair_checks.deadline()):
            if at is not None and (earliest is None or at < earliest):
                earliest = at
        return earliest

    def check(self) -> None:
        """Check the invariants of the request table and the role changes. Raises Broken."""
        self.table.check()
        self.members.check(self.table)
        self.delivery.connections.check(self.table)
        self.flips.check()
        self.pair_checks.check()
        self.lifecycle.migrations.check()
        self.observer.timelines.check(self.table.choices.values())
        for choice in self.table.active():
            placed = self.members.by_iid.get(choice.holder) if choice.holder else None
            if choice.reason is None and choice.holder is not None and (placed is None or placed.lost is not None):
                raise Broken(f"{choice.id} is held by {choice.holder}, which is lost or unknown")

    # ------------------------------------------------------------ workers

    def _ready(self, event: Ready, now: float) -> list[Action]:
        iid = event.instance.iid
        if iid == BROKER:
            return []  # the id of the broker itself: workers would send that worker's messages here
        before = self.members.by_iid.get(iid)
        actions, replaced = self.members.ready(event, now)
        if before is None or replaced is not None:
            again = "" if replaced is None else ", restarted"
            self.observer.happened("joined", iid, f"{event.instance.role}{again}", now)
        elif before.lost is not None:
            self._back(before, now)
        self.timers.set(("silence", iid), now + self.limits.dead_s)
        if replaced is not None:
            self.counters["workers_replaced"] += 1
            why = f"{iid} was restarted"
            actions += [*self.flips.gone(iid, why), *self.lifecycle.restart_all(replaced, "worker_restarted", why, now)]
        self.costs.announced(self.members.by_iid[iid], event.cost)
        actions += self.flips.role_reported(self.members.by_iid[iid], event.instance.role, now)
        return [*actions, *self.lifecycle.place_waiting(now)]

    def _up(self, iid: str, now: float) -> list[Action]:
        self.members.connected(iid)
        return self.lifecycle.place_waiting(now)

    def _down(self, iid: str, now: float) -> list[Action]:
        self.members.disconnected(iid)
        return self._lose(iid, "connection lost", now)

    def _silent(self, iid: str, now: float) -> list[Action]:
        """Handle the due silence timer of a worker. After a first timeout the broker itself may have been too slow to
        read, so it first reads the messages in its sockets and counts the worker as lost only after a second one."""
        member = self.members.by_iid.get(iid)
        if member is None or member.lost is not None:
            return []
        silent_at = member.seen + self.limits.dead_s
        if now < silent_at:
            self.timers.set(("silence", iid), silent_at)
            return []
        if member.suspect:
            return self._lose(iid, f"silent for {self.limits.dead_s:g} s", now)
        member.suspect = True
        self.timers.set(("silence", iid), now + self.limits.heartbeat_s)
        return []

    def _lose(self, iid: str, why: str, now: float) -> list[Action]:
        member = self.members.by_iid.get(iid)
        if member is None or member.lost is not None:
            return []
        self.members.lose(member, why)
        self.counters["workers_lost"] += 1
        self.observer.happened("lost", iid, why, now)
        announced = self.flips.gone(iid, why)
        restarted = self.lifecycle.restart_all(member, "worker_lost", f"{iid}: {why}", now)
        # Without the lost worker, the others may be allowed larger prompts (`Members.pool`).
        return [*announced, *restarted, *self.lifecycle.place_waiting(now)]

    def _back(self, member: Member, now: float) -> None:
        """A lost worker is back as the same process."""
        self.observer.happened("back", member.iid, f"{member.role}, the same process", now)
        self.lifecycle.back(member)

    def _received(self, event: FromWorker, now: float) -> list[Action]:
        member = self.members.known(event)
        if member is None:
            return []  # the worker registers again when it receives no membership
        member.seen, member.suspect = now, False
        actions: list[Action] = []
        if member.lost is not None and member.iid in self.members.up:
            self.members.lose(member, None)
            self._back(member, now)
            self.timers.set(("silence", member.iid), now + self.limits.dead_s)
            actions += self.lifecycle.place_waiting(now)
        match event:
            case Tokens():
                actions += self.lifecycle.tokens(event, member, now)
            case Heartbeat() | Staged() | LoneStep() if member.lost is not None:
                pass  # without a connection, the loss of this worker would not be detected a second time
            case Heartbeat():
                member.load, member.counters = event.load, event.counters
                member.held = member.held if event.holds is None else len(event.holds)
                member.slots_used, member.predictor = event.slots_used, event.predictor
                member.unread_by, member.step_ratio = event.unread_by, event.step_ratio
                self.costs.compare(member)
                self.members.recount(member.iid)
                member.activity = event.activity
                self.observer.traced(event, member, self.table.choices, now)
                self.pair_checks.unread(event.iid, event.unread_by)
                flipped = self.flips.role_reported(member, event.role, now, event.flip)
                actions += [*flipped, *self.lifecycle.place_waiting(now)] if flipped else ()
                actions += self.lifecycle.reconcile(event, now)
            case Staged() | Failed() | NotMigrated():
                actions += self.lifecycle.moved(event, now)
            case LoneStep():
                actions += self.lifecycle.lone_step(event, member, now)
        return actions

    # ------------------------------------------------------------ clients

    def _submit(self, event: Submitted, now: float) -> list[Action]:
        if event.key in self.table.keys:
            return self._submit_again(event, now)
        sampling = event.sampling.limited(self._default_tokens(event))
        problem = self._problem(event, sampling)
        if problem is not None:
            return [self._refuse(event, problem)]
        self.counters["accepted"] += 1
        slo = self.limiter.of(event.slo, len(event.prompt))
        request, actions = self.delivery.admit(event, sampling, slo, now)
        if request.deadline is not None:
            self.timers.set(("deadline", request.rid), request.deadline)
        return [*actions, *self.lifecycle.place(request.choices, now)]

    def _problem(self, event: Submitted, sampling: Sampling) -> Problem | None:
        """Why a request is not accepted; None if it is."""
        prompt, most, n = len(event.prompt), sampling.max_tokens, event.n
        if (problem := self.delivery.problem(event, sampling)) is not None:
            return problem
        if (why := self.members.too_long(prompt, prompt + most)) is not None:
            return Problem("too_long", why)
        if (why := self.members.too_many(prompt, n)) is not None:
            return Problem("too_many_choices", why)
        why = self.full(needed_bytes(prompt, most, n, sampling))
        return None if why is None else Problem("full", why)

    def _refuse(self, event: Submitted, problem: Problem) -> Reply:
        self.counters["refused"] += 1
        self.observer.refused(problem.reason)
        retry_after_s = RETRY_AFTER_S if problem.reason == "full" else None
        return refuse(event.client, event.key, problem.why, retry_after_s)

    def _default_tokens(self, event: Submitted) -> int:
        """The limit of a request that names none. At least 1: where nothing fits, that is refused."""
        prompt = len(event.prompt)
        space = min(self.limits.context - prompt, self.members.output_limit(prompt))
        return max(1, int(min(space, event.default_tokens)))

    def full(self, size: int, others: int = 0) -> str | None:
        """Why no further request of `size` bytes is accepted at the moment; None if one is. `others`: requests that
        come before it. Each choice of a request is one that is open."""
        count, held = self.table.open + others, self.table.weight
        if count >= self.limits.max_open:
            return f"{count} choices are open, try later"
        if held + size > self.limits.max_mib << 20:
            return f"the requests here may need {held / 2**20:.0f} of {self.limits.max_mib} MiB, try later"
        return None

    def _submit_again(self, event: Submitted, now: float) -> list[Action]:
        """Handle a Submit whose key is known. What is refused changes nothing for the client of that key's request."""
        request = self.table.requests[self.table.keys[event.key]]
        if not request.repeated_by(event):
            return [self._refuse(event, Problem("repeated_key", ANOTHERS))]
        self.lifecycle.remember(request, now)
        return self.delivery.again(request, event.client, now)

    def _client(self, event: FromClient, now: float) -> list[Action]:
        message = event.message
        if isinstance(message, Inspect):
            return [Reply(event.client, self.status(now))]
        if isinstance(message, Observe):
            answer = self.observer.observation(self.status(now), message.epoch, message.since, now)
            return [Reply(event.client, answer)]
        if isinstance(message, Explain):
            return [self._explain(event.client, message, now)]
        if isinstance(message, CheckReadiness):
            return self.pair_checks.ask(event.client, now)
        if isinstance(message, ChangeRole):
            return [*self.flips.ask(event.client, message, now), *self.lifecycle.place_waiting(now)]
        assert isinstance(message, Cancel | Attach | EndRequest)
        request = self.table.named(message.rid)
        # A wrong secret gets the answer to an unknown rid, which does not tell whether there is such a request.
        if request is None or not (isinstance(message, EndRequest) or request.owned_by(message.secret)):
            return [refuse(event.client, message.rid, f"no request {message.rid} is known here")]
        if isinstance(message, Attach):
            return self._attach(event.client, message, request, now)
        ended = [choice.outbox.done for choice in request.choices if choice.outbox.done is not None]
        if len(ended) < len(request.choices) and event.client not in (request.client, *request.watchers):
            request.watchers.append(event.client)
        replies = [Reply(event.client, done) for done in ended]
        return [*replies, *self.lifecycle.end_all(request.choices, "cancelled", now)]

    def _explain(self, client: bytes, asked: Explain, now: float) -> Reply:
        """The answer to an Explain. Clients know it by the id of the choice, a refusal too."""
        name = choice_id(asked.rid, asked.choice)
        found = self.observer.timelines.timeline(name, self.table.choices.get(name), now)
        if found is None:
            return refuse(client, name, f"nothing is known here of choice {asked.choice} of request {asked.rid}")
        return Reply(client, found)

    def _attach(self, client: bytes, message: Attach, request: Request, now: float) -> list[Action]:
        if message.choice >= len(request.choices):
            why = f"the request has {len(request.choices)} choices, and none of index {message.choice}"
            return [refuse(client, message.rid, why)]
        self.timers.clear(("grace", request.rid))
        self.lifecycle.remember(request, now)
        return self.delivery.attach(request.choices[message.choice], client, message.start, now)

    def _detokenized(self, event: Detokenized, now: float) -> list[Action]:
        choice = self.table.choices.get(event.rid)
        if choice is None or choice.outbox.done is not None:
            return []
        ending = choice.reason is not None
        actions = self.delivery.detokenized(choice, event, now)
        found = choice.reason is not None and not ending  # a stop text
        return [*actions, *self.lifecycle.finish(choice, now)] if found or event.final else actions

    def _undelivered(self, event: Undelivered, now: float) -> list[Action]:
        for request in self.delivery.undelivered(event, now):
            self.timers.set(("grace", request.rid), now + self.limits.client_grace_s)
        return []

    def _request_timer(self, what: str, who: str, now: float) -> list[Action]:
        """Handle a due timer: of a choice if it is `patience`, else of a request."""
        if what == "patience":
            why = f"no prefill instance for {self.limits.patience_s:g} s"
            return self.lifecycle.end(self.table.choices[who], "error", now, why)
        request = self.table.requests[who]
        match what:
            case "forget":
                # A slow client has not got the end yet. Not `client_grace_s`, which may be 0: this would never end.
                if self.delivery.connections.waits(request) and now - request.ended_at < self.limits.patience_s:
                    self.timers.set(("forget", request.rid), now + SLOW_S)
                    return []
                self.timers.clear(("grace", request.rid))
                self.delivery.connections.leave(request)
                self.observer.forgotten(request)
                self.table.forget(request.rid)
                return []
            case "grace":
                gone = request.client is None
                return self.lifecycle.end_all(request.choices, "cancelled", now) if gone else []
            case "deadline":
                return self.lifecycle.end_all(request.choices, "deadline", now)
            case "verdict":
                return self.lifecycle.judge(request, now)
        raise Broken(f"unknown timer {what}")

    def status(self, now: float) -> Status:
        """The answer to Inspect: instances, open choices by stage, counters and the newest cluster view."""
        counters = dict(sorted(self.counters.items()))
        instances, requests = self.members.status(), self.table.counts()
        monitor = None
        if self.seen is not None:
            view, at = self.seen
            monitor = MonitorStatus(number=view.number, age_s=now - at, flip=view.flip)
        return Status(
            instances=instances,
            requests=requests,
            counters=counters,
            model=self.model,
            monitor=monitor,
            slo=self.limiter.found,
            slo_requests=dict(self.observer.meters.counts["slo_requests"]),
            notes=notes(instances, monitor, {iid: each.why for iid, each in self.lifecycle.breaker.failing.items()}),
        )
