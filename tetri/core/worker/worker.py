"""The worker's core: the prefill and decode schedulers over one engine and one ledger."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import inf
from random import Random

from tetri.core.actions import (
    BROKER,
    Action,
    Adopted,
    Broken,
    Exported,
    Freed,
    LengthKnown,
    RequestRejected,
    Send,
    Step,
    WorkerInput,
)
from tetri.core.decode.hand_overs import FreeMemory
from tetri.core.decode.scheduler import DecodeScheduler
from tetri.core.instance.activity import ActivityLog
from tetri.core.instance.identity import Identity
from tetri.core.instance.ledger import Ledger
from tetri.core.instance.peers import Peers
from tetri.core.length.estimator import LengthEstimator
from tetri.core.prefill.scheduler import PrefillScheduler
from tetri.core.timers import Timers
from tetri.core.worker.chunk_limit import ChunkLimit
from tetri.core.worker.home import WorkerHome
from tetri.core.worker.load_report import LoadReporter
from tetri.core.worker.lone_steps import LoneSteps
from tetri.core.worker.unlisted import Unlisted
from tetri.cost import CorrectedCost
from tetri.engine_request import Span, StepDone
from tetri.request import ROLES
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.handover import Chunk, Defer, Drop, Grant, Landed, LengthUpdate, Offer, Refuse
from tetri.wire.messages import Assign, Close, ClusterView, Flip, Membership, Migrate, Proceed, Resend

HEARTBEAT, LOAD, REGISTER, FETCH_AGAIN = "heartbeat", "load", "register", "fetch again"


class Worker:
    """Dispatches events to the prefill and decode schedulers and plans engine steps.

    `stepping`: the engine computes a step; messages are read and the next step is planned only between steps.
    `idle`: no step can be planned, or the last one made no progress; the next event ends it."""

    def __init__(self, own: Identity, rng: Random, now: float) -> None:
        self.own = own
        self.timers: Timers[str] = Timers()
        self.peers = Peers(own)
        self.ledger = Ledger(own.capacity.blocks, own.reserve_share)
        self.estimator = None if own.expected is None else LengthEstimator(own)
        self.activity = ActivityLog(now, traces=own.traces)
        self.cost = CorrectedCost(own.cost)
        shared = (self.estimator, self.activity, self.cost)
        self.prefill = PrefillScheduler(self.ledger, self.peers, self.timers, rng, *shared)
        self.dispatcher = self.prefill.dispatcher
        self.decode = DecodeScheduler(own, self.ledger, self.peers, *shared)
        self.hand_overs, self.migrations = self.decode.hand_overs, self.decode.migrations
        self.lone_steps = LoneSteps(self.prefill, self.decode)
        self.stepping = False
        self.idle = False
        self.reporter = LoadReporter(self.prefill, self.decode, self.activity, self.cost, now)
        self.dispatcher.pool.home = WorkerHome(self.reporter, self.hand_overs)
        self._step_at = now
        self.chunk_limit = ChunkLimit(self.prefill, self.decode.batch, self.cost)
        self._fewer = False  # the batch has lost a request since the step was planned
        self.unlisted = Unlisted(self.peers)
        self._queued_own: list[Action] = []  # messages to this instance, held while the engine computes
        self.timers.set(HEARTBEAT, now)
        self.timers.set(LOAD, now)

    # ------------------------------------------------------------ the interface of a core

    def handle(self, event: WorkerInput, now: float) -> list[Action]:
        """Process one event. Raises Broken for an event that is not a WorkerInput."""
        self.activity.now = now
        actions = self._handle(event, now)
        return self._deliver_own(actions, now) if actions else actions

    def _handle(self, event: WorkerInput, now: float) -> list[Action]:
        if isinstance(event, StepDone):
            return self._step_done(event, now)
        if isinstance(event, ClusterView):
            return self._viewed(event, now)
        self.idle = False
        match event:  # the most frequent first
            case Exported():
                prefills = event.key not in self.decode.requests
                return self.prefill.exported(event) if prefills else self.migrations.exported(event, now)
            case Adopted():
                return self._set_fetch_timer(self.hand_overs.adopted(event, now))
            case Freed():
                self.prefill.kv_send.freed(event.slots)
                return []
            case Chunk() | Offer() | LengthUpdate() | Drop() if self.unlisted.keeps(event):
                return []
            case Chunk():
                return self.hand_overs.chunk(event)
            case Grant() | Defer() | Refuse() | Landed():
                return self._answered(event, now)
            case Offer():
                return self.hand_overs.offer(event, now, self._free_memory())
            case LengthUpdate():
                return self.hand_overs.update_length(event)
            case Assign():
                return self.prefill.assign(event, now)
            case Proceed():
                return self.lone_steps.proceed(event)
            case Migrate():
                return self.migrations.migrate(event, self.hand_overs.granted(event.rid, event.attempt), now)
            case Close():
                return self._closed(event)
            case LengthKnown():
                return self.prefill.lengths.known(event, now, stepping=self.stepping)
            case Drop():
                return self.hand_overs.drop(event)
            case Resend():
                return [*self.prefill.resend(event), *self.decode.resend(event)]
            case RequestRejected():
                return self._rejected(event)
            case Membership():
                return self._membership(event, now)
            case Flip():
                return self._flip(event, now)
            case PeerUp():
                return [self._register(now)] if event.peer == BROKER else self._up(event.peer, now)
            case PeerDown():
                return self._down(event.peer, now)
        raise Broken(f"a worker does not handle {event}")

    def _rejected(self, event: RequestRejected) -> list[Action]:
        if event.key in self.prefill.requests:
            return self.prefill.reject(event.key, event.why)
        self._fewer = True
        return self.hand_overs.reject(event.key, event.why)

    def tick(self, now: float) -> list[Action]:
        """Run every timer that is due, then start a step unless one is running or there is nothing to plan."""
        self.activity.now = now
        actions: list[Action] = []
        for key in self.timers.due(now):
            if key == LOAD:
                actions += [self._report(now), *self._allow_retry(now)]
            elif key == HEARTBEAT:
                actions += self._heartbeat(now)
            elif key == REGISTER:
                actions.append(self._register(now))
            elif key == FETCH_AGAIN:
                actions += self._set_fetch_timer(self.hand_overs.fetch_again(now))
            else:
                actions += self.prefill.lengths.due(self.prefill.requests[key], now)
        actions = self._deliver_own(actions, now) if actions else actions
        if self.stepping:
            return actions
        actions += self.migrations.step(self.prefill.kv_send) if self.migrations.by_key else ()
        return actions if self.idle else actions + self._step(now)

    def deadline(self) -> float | None:
        """The time of the next `tick`: -inf for at once, None while a step is running."""
        if self.stepping:
            return None
        return self.timers.next() if self.idle else -inf

    def check(self) -> None:
        """Check the ledger and both schedulers. Raises Broken."""
        self.ledger.audit()
        self.prefill.check()
        self.dispatcher.check()
        self.decode.check()
        accounts = sum(request.running for request in self.prefill.requests.values())
        decodes = [request for request in self.decode.requests.values() if request.landed_as or not request.stays]
        accounts += sum(request.end is None for request in decodes)
        if accounts != len(self.ledger):
            raise Broken(f"the ledger has {len(self.ledger)} accounts for {accounts} engine requests")

    def _deliver_own(self, actions: list[Action], now: float) -> list[Action]:
        """Deliver messages addressed to this instance directly instead of over a socket; while a step is running,
        queue them. What a message causes comes after all actions of what was handled before it: these may free or
        replace what that added. A loop, because thousands may come at once."""
        own = self.own.iid
        for action in actions:
            if isinstance(action, Send) and action.peer == own:
                break
        else:
            return actions  # the usual case
        left = deque(actions)
        others: list[Action] = []
        while left:
            action = left.popleft()
            if not isinstance(action, Send) or action.peer != own:
                others.append(action)
            elif self.stepping:
                self._queued_own.append(action)
            else:  # a worker sends itself only messages between workers, which are WorkerInput
                left.extend(self._handle(action.message, now))  # type: ignore[arg-type]
        return others

    # ------------------------------------------------------------ the engine

    def _step(self, now: float) -> list[Action]:
        """Plan the next engine step. Each decode takes one token of the step's token budget, a prefill chunk gets the
        rest. While prompts wait, the batch is therefore kept smaller than the budget."""
        queued, batch, prefill = len(self.prefill.queue), self.decode.batch, self.prefill
        batch.promised = prefill.overtaken(now) if queued and batch.running else 0  # what decodes write frees memory
        if not queued and not self.decode.forecast.requests:
            self.idle = True
            return []
        lone_steps = self.lone_steps
        self._fewer = lone_steps.yields = False
        if lone_steps.waits or lone_steps.next is not None:
            actions = lone_steps.begin()
            if lone_steps.running is not None or lone_steps.waits:
                return self._start_step(actions, 1, now) if lone_steps.running is not None else self._wait(actions)
        budget, most = self.own.capacity.chunk_tokens, self.own.capacity.max_batch
        admitted = self.decode.admit(min(most, budget - 1) if queued else most)
        decodes = len(batch.running) - len(batch.preempted)
        actions = [*admitted, *(self._grant_deferred(now) if self.hand_overs.deferred.blocks else ())]
        chunk = None
        if queued and batch.lone is None:
            if self.role == "auto" and not batch.stuck():  # else a prompt may hold the memory that the batch needs
                chunk = self.chunk_limit.tokens(budget - decodes, now)
            # A prompt that stays keeps its blocks: leave the batch what it will need, as a grant does.
            free = self.ledger.free - (batch.growth() if self.dispatcher.decodes_here else 0)
            actions += self._deliver_own(prefill.plan(budget - decodes if chunk is None else chunk, free, now), now)
        lone = batch.lone or prefill.lone()
        if lone is not None and not lone_steps.gives_way(lone):
            return self._wait([*actions, *lone_steps.announce(lone)])
        if not prefill.expected:
            if prefill.queue.blocked() is not None:  # known only now, and its memory may suffice for a deferred offer
                actions += self._grant_deferred(now)
            if not self.decode.steps():
                return self._wait(actions)
            blocked = prefill.queue.blocked()
            if blocked is not None and batch.stuck() and not admitted and blocked.lacks_memory:
                actions += self._deliver_own(prefill.retreat(blocked, "its memory went to decodes"), now)
        if len(batch.running) - len(batch.preempted) < decodes:  # an own offer replaced an older attempt in the batch
            self._fewer = True
        if prefill.queue.started:
            actions += prefill.holding()
        timer = self.timers.next()
        assert timer is not None  # the heartbeat's timer is always set
        most = 1 if prefill.expected or chunk is not None else batch.most(timer - now)
        return self._start_step(actions, most, now, chunk)

    def _grant_deferred(self, now: float) -> list[Action]:
        return self._deliver_own(self.hand_overs.grant_deferred(now, self._free_memory()), now)

    def _free_memory(self) -> FreeMemory | None:
        """Return what frees the memory of the blocked prompt for a decode request; None if nothing can be freed now."""
        return None if self.stepping or self.prefill.queue.blocked() is None else self.prefill.free_memory

    def _start_step(self, actions: list[Action], most: int, now: float, chunk: int | None = None) -> list[Action]:
        self.stepping, self._step_at = True, now
        return [*actions, Step(most, chunk)]

    def _wait(self, actions: list[Action]) -> list[Action]:
        """Compute nothing until the next event."""
        self.idle = True
        return actions

    def _step_done(self, done: StepDone, now: float) -> list[Action]:
        self.stepping = False
        seconds = now - self._step_at
        self.reporter.step_times.step_done(done, seconds)
        if done.steps == 1:
            self.ledger.check(done.held)
        choices, batch, prefilled, decoded = self.prefill.choices, self.decode.batch, None, done
        actions, self._queued_own = self._queued_own, []
        if self.prefill.queue.started:  # otherwise everything in `done` belongs to the decode scheduler
            prefilled, decoded = done.parts(choices)
        self.activity.step_done(seconds, len(decoded.tokens), done.steps)
        if done.spans:
            chunk = _tokens(prefilled.spans) if prefilled is not None else 0
            self.activity.spans_done(chunk, self.prefill.budget, _tokens(decoded.spans) if decoded.spans else 0)
        if prefilled is not None:
            strained = self._fewer or bool(done.preempted) or self.ledger.free < 0
            strained = strained or any([span.key in batch.preempted for span in decoded.spans])
            actions += self.prefill.step_done(prefilled, strained=strained)
        # Also for requests that end in this step: accuracy is judged by their last estimate.
        for estimate in decoded.estimates:
            self.decode.estimates(estimate)
        actions += self.decode.step_done(decoded)
        if done.steps > 1:
            self.ledger.check(done.held)  # only now have the accounts grown by all tokens of the run
        if self.lone_steps.running is not None:
            actions += self.lone_steps.ended()
        if prefilled is not None:
            actions += self.prefill.place(prefilled, now)
        self.idle = not (done.spans or done.tokens or done.allocated or self._way_out())
        return actions

    def _way_out(self) -> bool:
        """Whether the next step may make progress after one that made none."""
        others = self.lone_steps.yields or self.prefill.queue.blocked() is not None
        return self.decode.stuck() or (self.decode.batch.stuck() and others)

    def _set_fetch_timer(self, actions: list[Action]) -> list[Action]:
        """Set the timer that fetches a lost KV chunk again, if there is one."""
        at = self.hand_overs.kv_receive.next()
        if at is not None:
            self.timers.set(FETCH_AGAIN, at)
        return actions

    # ------------------------------------------------------------ peers

    def _membership(self, membership: Membership, now: float) -> list[Action]:
        actions, gone = self.peers.update(membership)
        known = self.peers.listed and not self.peers.behind
        self.timers.set(REGISTER, now + self.own.view_s if known else now)
        self.peers.expire(now)
        for iid in gone:
            self.dispatcher.breaker.failing.pop(iid, None)
            actions += self._lost(iid, now)
        actions += self.dispatcher.allow_retry(now)
        for message in self.unlisted.release():
            actions += self._handle(message, now)
        return actions

    def _answered(self, event: Grant | Defer | Refuse | Landed, now: float) -> list[Action]:
        migration = self.migrations.of(event)
        if migration is not None:
            return self.migrations.answered(migration, event)
        request = self.dispatcher.request_of(event)
        if request is None:  # the offer is closed
            if isinstance(event, Landed):  # the broker's Close was faster; but who copied a chunk can read
                self.dispatcher.breaker.succeeded(event.src)
            # The offer was dropped, and the Drop may have been lost.
            return [self.dispatcher.renounce(event)] if isinstance(event, Grant | Defer) else []
        if isinstance(event, Defer):
            self.dispatcher.defer(request, now)
            return []
        if isinstance(event, Refuse):
            self.activity.happened("refused", request.lead, event.src, event.why)
            hopeless = event.unread and self.dispatcher.readers.failed(request, event, now)
            if hopeless or request.pinned or request.flow.stays or not request.flow.movable:
                why = f"{event.src} cannot go on with the KV: {event.why}"
                return self.prefill.give_up(request, why, avoid=self.dispatcher.readers.avoided(request))
            if event.unread:
                self.dispatcher.unread(request)
            else:
                self.dispatcher.refused(request, event.why)
            return self.dispatcher.dispatch(now)
        actions = self.dispatcher.granted(request, now)  # a Landed implies a grant, also if the Grant was lost
        actions += self.prefill.kv_send.landed(request, event.index) if isinstance(event, Landed) else []
        if request.flow.complete and event.src in self.dispatcher.breaker.failing:
            self.dispatcher.breaker.succeeded(event.src)
        return actions

    def _viewed(self, view: ClusterView, now: float) -> list[Action]:
        """Place requests by newer loads. Only that can make a step possible, so otherwise `idle` stays."""
        actions = self.dispatcher.allow_retry(now) if self.peers.see(view, now) else []
        self.idle = self.idle and not actions
        return actions

    def _closed(self, message: Close) -> list[Action]:
        self.prefill.lengths.closed(message)
        rid, attempt = message.rid, message.attempt
        return [*self.prefill.close(rid, attempt), *self.hand_overs.close(rid, attempt)]

    def _up(self, peer: str, now: float) -> list[Action]:
        self.peers.connected(peer)
        again = self.dispatcher.reconnected(peer, now)
        return [*again, *self.hand_overs.repeat(peer), *self.dispatcher.dispatch(now)]

    def _down(self, peer: str, now: float) -> list[Action]:
        if peer == BROKER:
            return []  # keep working; PeerUp registers this worker again
        self.peers.disconnected(peer)
        return self._lost(peer, now)

    def _lost(self, iid: str, now: float) -> list[Action]:
        actions = [*self.hand_overs.orphaned(iid), *self.migrations.lost(iid)]
        for request in self.dispatcher.aimed_at(iid):
            if request.flow.movable and not request.pinned and not (request.may_decode and request.lost):
                self.activity.happened("refused", request.lead, iid, "it was lost")
                actions += self.prefill.lost_with(request, iid) if request.may_decode else ()
                self.dispatcher.refused(request, "lost")
            else:  # also a request that may have killed two
                actions += self.prefill.give_up(request, f"{iid} was lost with part of the KV", lost=iid)
        return [*actions, *self.dispatcher.dispatch(now)]

    # ------------------------------------------------------------ roles, reports and retries

    @property
    def role(self) -> str:
        """The role that others see when they send new work. Work that arrives is served whatever the role."""
        return self.reporter.role

    def _flip(self, flip: Flip, now: float) -> list[Action]:
        """Change the role. Engine, weights and requests stay as they are. A repeated Flip is confirmed again, since
        the heartbeat that confirmed the first may have been lost."""
        if flip.role in ROLES:
            self.reporter.role, self.reporter.flip = flip.role, flip.number
        self.peers.changed()
        return [self.reporter.heartbeat(), self._report(now), *self.dispatcher.dispatch(now)]

    def _report(self, now: float) -> Action:
        self.timers.set(LOAD, now + self.own.load_s)
        return self.reporter.report(now)

    def _allow_retry(self, now: float) -> list[Action]:
        """Ask instances that refused again. Each cluster view does so; this timer replaces a missing monitor."""
        if not self.dispatcher.waiting() or now - self.peers.seen_at < 2.5 * self.own.load_s:
            return []
        self.peers.outdate()  # the memory that the refusals reported is out of date
        return self.dispatcher.allow_retry(now)

    def _register(self, now: float) -> Action:
        self.timers.set(REGISTER, now + self.own.view_s)
        return self.reporter.ready()

    def _heartbeat(self, now: float) -> list[Action]:
        self.timers.set(HEARTBEAT, now + self.own.heartbeat_s)
        if self.idle:
            self.check()
        actions: list[Action] = []
        for request, why, retry in self.dispatcher.overdue(now, self.prefill.holds_up):
            actions += self.prefill.give_up(request, why, retry=retry)
            self.idle = False  # other prompts may take its place
        if self.dispatcher.breaker.failing:
            actions += self._unread(now)
        slot_deadlock = self.prefill.slot_deadlock()
        if slot_deadlock is not None:
            actions += self.prefill.give_up(slot_deadlock, "its decode instance let go, and others need its slots")
            self.idle = False
        expired = self.hand_overs.expire(now)
        self.idle = self.idle and not expired  # others may have waited for them
        again = [*self.hand_overs.resend_answers(), *self.migrations.repeat(now)]
        return [*actions, *expired, *again, self.reporter.heartbeat(), *self.lone_steps.repeat()]

    def _unread(self, now: float) -> list[Action]:
        """Give up the requests that no instance could read for too long, and offer one to each instance whose pause is
        over."""
        readers = self.dispatcher.readers
        actions: list[Action] = []
        for request, why, avoid in readers.overdue(self.prefill.requests.values(), now):
            actions += self.prefill.give_up(request, why, retry=bool(avoid), avoid=avoid)
            self.idle = False
        return [*actions, *self.dispatcher.dispatch(now)]


def _tokens(spans: Sequence[Span]) -> int:
    return sum([span.stop - span.start for span in spans])
