"""A worker's core: both halves over one engine and one ledger, the registration with the broker, the beats."""

from __future__ import annotations

from random import Random

from tetri.core.actions import (
    BROKER,
    Action,
    Adopted,
    Broken,
    Exported,
    LegRejected,
    Send,
    Step,
    WorkerInput,
)
from tetri.core.decode import Decode
from tetri.core.dispatch import Dispatcher
from tetri.core.ledger import Ledger
from tetri.core.peers import Identity, Neighbours
from tetri.core.prefill import Prefill
from tetri.core.timers import Timers
from tetri.leg import StepDone
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.messages import (
    Assign,
    Beat,
    Chunk,
    Close,
    ClusterView,
    Drop,
    Grant,
    Landed,
    Load,
    Offer,
    Ready,
    Refuse,
    Resend,
    Roster,
)

BEAT, REGISTER = "beat", "register"


class Worker:
    """`stepping` while the engine computes: messages are read, and the next step planned, only between steps.
    `idle` when nothing could be planned, or the last pass achieved nothing: until the next event."""

    def __init__(self, own: Identity, rng: Random, now: float) -> None:
        self.own = own
        self.timers: Timers[str] = Timers()
        self.neighbours = Neighbours(own)
        self.ledger = Ledger(own.capacity.blocks, own.reserve_share)
        self.dispatcher = Dispatcher(own, self.neighbours, self.timers, rng)
        self.prefill = Prefill(own, self.ledger, self.dispatcher)
        self.decode = Decode(own, self.ledger)
        self.stepping = False
        self.idle = False
        self.timers.set(BEAT, now)

    # ------------------------------------------------------------ the four verbs

    def handle(self, event: WorkerInput, now: float) -> list[Action]:
        if isinstance(event, StepDone):
            return self._step_done(event, now)
        self.idle = False
        match event:
            case Assign():
                return self.prefill.assign(event)
            case Close():
                closed = self.prefill.close(event.rid, event.attempt)
                return [*closed, *self.decode.close(event.rid, event.attempt)]
            case Resend():
                return [*self.prefill.resend(event), *self.decode.resend(event)]
            case Offer():
                return self.decode.offer(event)
            case Chunk():
                return self.decode.chunk(event)
            case Drop():
                return self.decode.drop(event)
            case Grant() | Refuse() | Landed():
                return self._answered(event, now)
            case Exported():
                return self.prefill.exported(event)
            case Adopted():
                return self.decode.adopted(event)
            case LegRejected():
                half = self.prefill if event.key in self.prefill.jobs else self.decode
                return half.reject(event.key, event.why)
            case Roster():
                return self._roster(event, now)
            case ClusterView():
                return self._view(event, now)
            case PeerUp():
                return self._up(event.peer, now)
            case PeerDown():
                return self._down(event.peer, now)
        raise Broken(f"a worker knows no {event}")

    def tick(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for key in self.timers.due(now):
            if key == BEAT:
                actions += self._beat(now)
            elif key == REGISTER:
                actions.append(self._register(now))
            else:
                actions += self.dispatcher.repeat(self.prefill.jobs[key], now)
        return actions if self.stepping or self.idle else [*actions, *self._step(now)]

    def deadline(self) -> float | None:
        if self.stepping:
            return None
        return self.timers.next() if self.idle else float("-inf")

    def check(self) -> None:
        self.ledger.check(())
        self.prefill.check()
        self.decode.check()
        accounts = sum(job.running for job in self.prefill.jobs.values())
        accounts += sum(seat.end is None for seat in self.decode.seats.values())
        if accounts != len(self.ledger):
            raise Broken(f"{len(self.ledger)} accounts for {accounts} legs")

    # ------------------------------------------------------------ the engine

    def _step(self, now: float) -> list[Action]:
        actions = [*self.prefill.plan(now), *self.decode.admit()]
        if not self.prefill.expected and not self.decode.steps():
            self.idle = True
            return actions
        self.stepping = True
        return [*actions, Step()]

    def _step_done(self, done: StepDone, now: float) -> list[Action]:
        self.stepping = False
        self.ledger.check(done.held)
        mine = self.prefill.jobs
        prefill = self.prefill.step_done(
            [span for span in done.spans if span.key in mine],
            [token for token in done.tokens if token.key in mine],
        )
        decode = self.decode.step_done(
            [span for span in done.spans if span.key not in mine],
            [token for token in done.tokens if token.key not in mine],
            done.allocated,
            done.preempted,
        )
        self.idle = not (done.spans or done.allocated or self.decode.stuck())
        return [*prefill, *decode]

    # ------------------------------------------------------------ peers

    def _answered(self, event: Grant | Refuse | Landed, now: float) -> list[Action]:
        job = self.dispatcher.job_of(event)
        if job is None:  # of an offer that was taken back, which may not be known there
            return [self.dispatcher.renounce(event)] if isinstance(event, Grant) else []
        if isinstance(event, Grant):
            job.flow.granted = True
            return []
        if isinstance(event, Landed):
            return self.prefill.landed(job, event.index)
        if event.spoilt or not job.flow.movable:
            return self.prefill.lose(job, f"{event.src} cannot go on with the KV: {event.why}")
        self.dispatcher.refused(job, event.why)
        return self.dispatcher.dispatch(now)

    def _view(self, view: ClusterView, now: float) -> list[Action]:
        if not self.neighbours.see(view):
            return []
        for job in self.prefill.jobs.values():
            job.refused.clear()
        return self.dispatcher.dispatch(now)

    def _roster(self, roster: Roster, now: float) -> list[Action]:
        actions, gone = self.neighbours.update(roster)
        listed = any((i.iid, i.incarnation) == (self.own.iid, self.own.incarnation) for i in roster.instances)
        self.timers.set(REGISTER, now + self.own.view_s if listed else now)
        for iid in gone:
            actions += self._lost(iid, now)
        for job in self.prefill.jobs.values():
            job.refused.clear()
        return [*actions, *self.dispatcher.dispatch(now)]

    def _up(self, peer: str, now: float) -> list[Action]:
        if peer == BROKER:
            return [self._register(now)]
        self.neighbours.up[peer] = None
        again = [action for job in self.dispatcher.aimed_at(peer) for action in self.dispatcher.repeat(job, now)]
        return [*again, *self.decode.repeat(peer), *self.dispatcher.dispatch(now)]

    def _down(self, peer: str, now: float) -> list[Action]:
        if peer == BROKER:
            return []  # go on; it is told again when it is back
        self.neighbours.up.pop(peer, None)
        return self._lost(peer, now)

    def _lost(self, iid: str, now: float) -> list[Action]:
        actions = self.decode.orphaned(iid)
        for job in self.dispatcher.aimed_at(iid):
            if job.flow.movable:
                self.dispatcher.refused(job, "lost")
            else:
                actions += self.prefill.lose(job, f"{iid} was lost with part of the KV")
        return [*actions, *self.dispatcher.dispatch(now)]

    # ------------------------------------------------------------ the broker

    def load(self) -> Load:
        return Load(
            free_blocks=self.ledger.free,
            queued=len(self.prefill.line) + len(self.prefill.raw),
            queued_tokens=self.prefill.queued_tokens(),
            waiting=self.decode.waiting(),
            running=self.decode.running(),
        )

    def _register(self, now: float) -> Action:
        own = self.own
        self.timers.set(REGISTER, now + own.view_s)
        ready = Ready(
            iid=own.iid,
            incarnation=own.incarnation,
            role=own.role,
            inbox=own.inbox,
            fingerprint=own.fingerprint,
            capacity=own.capacity,
            load=self.load(),
        )
        return Send(BROKER, ready)

    def _beat(self, now: float) -> list[Action]:
        self.timers.set(BEAT, now + self.own.beat_s)
        if self.idle:
            self.check()
        holds = [*self.prefill.holds(), *self.decode.holds()]
        beat = Beat(
            iid=self.own.iid,
            incarnation=self.own.incarnation,
            role=self.own.role,
            load=self.load(),
            holds=holds,
        )
        actions: list[Action] = []
        for job in list(self.prefill.jobs.values()):
            if job.stranded_at is not None and now - job.stranded_at > self.own.patience_s:
                why = f"no decode instance could be reached for {self.own.patience_s:g} s"
                actions += self.prefill.strand(job, why)
        jammed = self.prefill.jammed()
        if jammed is not None:
            actions += self.prefill.give_way(jammed)
        return [*actions, *self.decode.remind(), Send(BROKER, beat)]
