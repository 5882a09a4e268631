"""The prefill half of a worker: queue -> order -> chunk -> offer -> first token -> KV leaves, chunk by chunk.

A job is kept, with its first token, until the broker closes it: until then the broker can ask for it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tetri.core.actions import (
    BROKER,
    Action,
    AddLeg,
    Broken,
    CancelLeg,
    Exported,
    HoldLeg,
    Send,
)
from tetri.core.chunk import candidates, fill, ran
from tetri.core.dispatch import Dispatcher
from tetri.core.foresight import Foresight
from tetri.core.job import Job
from tetri.core.kvflow import Outflow
from tetri.core.leaving import Leaving
from tetri.core.ledger import Ledger
from tetri.core.lengths import Lengths
from tetri.core.peers import Identity
from tetri.core.queue import Queue
from tetri.leg import Foretold, Leg, Sampled, Span
from tetri.policy.views import Progress, QueuedPrompt
from tetri.request import Stage, blocks_for
from tetri.wire.messages import Assign, End, Failed, Hold, Resend, Staged, TokenItem, Tokens

Said = Staged | Tokens | Failed


class Prefill:
    """`jobs` by key. `started`: those whose leg is in the engine. `expected`: the chunk that is planned."""

    def __init__(
        self, own: Identity, ledger: Ledger, dispatcher: Dispatcher, foresight: Foresight | None = None
    ) -> None:
        self.own, self.ledger, self.dispatcher = own, ledger, dispatcher
        self.jobs: dict[str, Job] = dispatcher.jobs
        self.queue = Queue(own)
        self.started: dict[str, Job] = {}
        self.leaving = Leaving(own, dispatcher)
        self.lengths = Lengths(own, dispatcher, foresight)
        self.short = False  # the first in line waits for slots
        self.expected: list[Span] = []
        self._room = 0  # tokens that the planned step leaves to prefill
        self._attempts: dict[str, dict[str, None]] = {}  # rid -> keys of its jobs
        self._arrivals = self._turns = 0

    @property
    def slots_taken(self) -> int:
        return self.leaving.taken

    # ------------------------------------------------------------ what comes in

    def assign(self, message: Assign, now: float) -> list[Action]:
        key = f"p:{message.rid}:{message.attempt}"
        if key in self.jobs:
            return []  # the broker was not sure that it had reached us
        actions = self.close(message.rid, message.attempt - 1)
        own, tokens = self.own, len(message.prompt) + len(message.output)
        blocks = blocks_for(tokens, own.capacity.block_tokens)
        if not 0 < tokens < own.capacity.context or blocks > own.capacity.blocks:
            why = f"{tokens} tokens do not fit into instance {own.iid}"
            return [*actions, self._tell(Failed, rid=message.rid, attempt=message.attempt, why=why, retry=False)]
        self._arrivals += 1
        work_s = own.cost.prompt_s(tokens, 0, own.capacity.chunk_tokens)
        due = None if message.deadline_s is None else now + message.deadline_s
        job = Job(
            key,
            message.rid,
            message.attempt,
            tuple(message.prompt),
            tuple(message.output),
            message.sampling,
            QueuedPrompt(key, self._arrivals, tokens, now, work_s, due),
            Outflow(blocks),
            tokens,
            work_s,
        )
        self.jobs[key] = job
        self._attempts.setdefault(job.rid, {})[key] = None
        self.queue.enter(job)
        return [*actions, *self.lengths.arrived(job)]

    def close(self, rid: str, attempt: int) -> list[Action]:
        """Let go of every attempt up to this one, in any stage."""
        jobs = [self.jobs[key] for key in self._attempts.get(rid, ())]
        actions: list[Action] = []
        for job in [job for job in jobs if job.attempt <= attempt]:
            actions += self._forget(job, "closed")
        return actions

    def reject(self, key: str, why: str) -> list[Action]:
        """The engine cannot run this leg: the others of the chunk get its place."""
        job = self.jobs[key]
        others = [self.jobs[span.key] for span in self.expected if span.key != key]
        actions = self.give_up(job, why, retry=False)
        self._choose([Progress(other.key, other.done, other.goal) for other in others])
        return [*actions, *self.holding()]

    def resend(self, message: Resend) -> list[Action]:
        job = self.jobs.get(f"p:{message.rid}:{message.attempt}")
        if job is None:
            return []
        ids = job.outputs()[message.start :]
        item = TokenItem(job.rid, job.attempt, message.start, ids, job.end)
        return [self._tell(Tokens, items=[item])] if ids or job.end else []

    # ------------------------------------------------------------ the next chunk

    def plan(self, room: int, now: float) -> list[Action]:
        """Choose the next chunk, of up to `room` tokens, and hand the engine just the legs that fill it. If it is none
        for want of slots, the first is offered all the same: the reserve is there for it once it is granted."""
        self._room, most, free = room, self.own.capacity.max_batch, self.ledger.free
        prompts = candidates(self.queue, self.jobs, self.started, room, free, most)
        self._choose(prompts)
        keys = [span.key for span in self.expected]
        if self.short and not self.dispatcher.waiting():
            keys = [prompts[0].key]
        actions: list[Action] = []
        for job in map(self.jobs.__getitem__, keys):
            if not job.running:
                actions += self._start(job, now)
        return actions

    def _choose(self, prompts: list[Progress]) -> None:
        self.expected = fill(self.own, self._room, prompts, self.jobs, self.started, self.leaving.spare())
        self.short = bool(prompts) and not self.expected

    def _start(self, job: Job, now: float) -> list[Action]:
        if not self.ledger.take(job.key, job.flow.blocks):
            raise Broken(f"{job.key} was planned without room")
        self.queue.start(job)
        self.started[job.key] = job
        job.running = True
        leg = Leg(job.key, "prefill", job.prompt + job.output, len(job.prompt), job.sampling)
        self._turns += 1
        job.turn = self._turns
        self.lengths.started(job, self.expected)
        self.dispatcher.started(job, now)
        staged = self._tell(Staged, rid=job.rid, attempt=job.attempt, stage=Stage.PREFILL)
        return [AddLeg(leg), staged, *self.dispatcher.dispatch(now)]

    def holding(self) -> list[Action]:
        """Keep what is started and not in the planned chunk out of the step."""
        planned = {span.key for span in self.expected}
        actions: list[Action] = []
        for key, job in self.started.items():
            if job.held == (key in planned):
                job.held = not job.held
                actions.append(HoldLeg(key, job.held))
        return actions

    def blocked(self) -> Job | None:
        """The one that holds memory and cannot go on: it waits for slots, and no decode instance has taken it."""
        job = next(iter(self.started.values()), None) if self.short else None
        return None if job is None or job.granted else job

    def holds_up(self, job: Job) -> bool:
        """Whether it waits for slots before others for which there is a decode instance."""
        if self.blocked() is not job:
            return False
        others = [self.jobs[key] for key in (*self.queue.raw, *self.queue.line)]
        return any(not other.decodes or self.dispatcher.pool.fits(other) for other in others)

    def make_room(self, rid: str, blocks: int) -> list[Action]:
        """Give the memory of the blocked leg to a request that asks for so many blocks to be decoded here. Else two
        instances that do both could wait for each other's memory for ever. Of two requests that ask each other's
        instances at the same time, the one with the lower id wins, on both."""
        job = self.blocked()
        if job is None or job.rid == rid or (job.flow.offer is not None and job.rid < rid):
            return []
        enough = self.ledger.free + job.flow.blocks >= blocks
        return self.retreat(job, "its memory went to a request to be decoded") if enough else []

    def retreat(self, job: Job, why: str) -> list[Action]:
        """Give the memory of one back whose KV is all here, since nobody has taken it. It begins again, behind those
        that have started, when there is room."""
        self._stop(job)
        self.queue.computed(job, 0)
        job.turn = 0
        actions = [CancelLeg(job.key), *self.dispatcher.forget(job, why), *self.leaving.drain(job)]
        job.flow = Outflow(job.flow.blocks)
        return actions

    # ------------------------------------------------------------ what the step did

    def step_done(
        self,
        spans: Sequence[Span],
        tokens: Sequence[Sampled],
        preempted: Sequence[str],
        foretold: Sequence[Foretold],
        now: float,
        *,
        strained: bool,
    ) -> list[Action]:
        """Tokens go out first, then the KV of the blocks that this chunk filled. `strained`: memory was short or the
        engine computed a preempted decode again, so that it may have run other tokens than planned of the chunk."""
        planned, self.expected = self.expected, []
        if not ran(planned, spans, self.jobs, strained=strained):
            raise Broken(f"planned {planned}, the engine ran {list(spans)}")
        for span in spans:
            self.queue.computed(self.jobs[span.key], span.stop)
        actions = self._first_tokens(tokens)
        actions += self.lengths.stepped(planned, foretold, now)
        for span in spans:
            actions += self.leaving.export(self.jobs[span.key])
        for key in preempted:
            self.queue.computed(self.jobs[key], 0)
        return actions

    def _first_tokens(self, tokens: Sequence[Sampled]) -> list[Action]:
        items: list[TokenItem] = []
        after: list[Action] = []
        for sampled in tokens:
            job = self.jobs[sampled.key]
            if job.done != job.goal or job.token is not None:
                raise Broken(f"a token for {job.key} at {job.done} of {job.goal}")
            reason = sampled.reason or (None if job.decodes else "length")
            end = End(reason=reason, receipt=job.receipt(self.own.iid)) if reason else None
            items.append(TokenItem(job.rid, job.attempt, len(job.output), list(sampled.ids), end))
            job.token = sampled.token
            self._stop(job)
            self.queue.leave(job)
            after += self._end(job, end) if end else self._move(job)
        return [self._tell(Tokens, items=items), *after] if items else []

    def _stop(self, job: Job) -> None:
        """Its leg is no longer in the engine."""
        del self.started[job.key]
        job.running = job.held = False
        self.ledger.close(job.key)

    def _move(self, job: Job) -> list[Action]:
        return [self._tell(Staged, rid=job.rid, attempt=job.attempt, stage=Stage.MOVING, peer=job.flow.target)]

    def _end(self, job: Job, end: End) -> list[Action]:
        """The first token ends the request: no more KV moves."""
        job.end = end
        return [*self.dispatcher.forget(job, "finished"), *self.leaving.drain(job)]

    def exported(self, event: Exported) -> list[Action]:
        return self.leaving.exported(self.jobs.get(event.key), event)

    # ------------------------------------------------------------ letting go

    def give_up(self, job: Job, why: str, *, retry: bool = True) -> list[Action]:
        """It cannot go on here, perhaps since part of its KV is gone with a decode instance; another attempt may."""
        return [*self._forget(job, why), self._fail(job, why, retry=retry)]

    def jammed(self) -> Job | None:
        """One that must be given up: a granted one waits for its slots."""
        waits = self.short and any(job.granted for job in self.started.values())
        return self.leaving.jammed() if waits else None

    def _forget(self, job: Job, why: str) -> list[Action]:
        del self.jobs[job.key], self._attempts[job.rid][job.key]
        if not self._attempts[job.rid]:
            del self._attempts[job.rid]
        if job.token is None:
            self.queue.leave(job)
        cancel: list[Action] = [CancelLeg(job.key)] if job.running else []
        if job.running:
            self._stop(job)
        return [*cancel, *self.dispatcher.forget(job, why), *self.leaving.drain(job)]

    # ------------------------------------------------------------ what it says of itself

    def holds(self) -> list[Hold]:
        return [Hold(job.rid, job.attempt, job.stage, len(job.outputs())) for job in self.jobs.values()]

    def _fail(self, job: Job, why: str, *, retry: bool) -> Action:
        return self._tell(Failed, rid=job.rid, attempt=job.attempt, why=why, retry=retry)

    def _tell(self, kind: type[Said], **fields: Any) -> Send:
        return Send(BROKER, kind(iid=self.own.iid, incarnation=self.own.incarnation, **fields))

    def check(self) -> None:
        """Count everything again."""
        self.queue.check(self.jobs)
        if any((job.key in self.ledger) != job.running for job in self.jobs.values()):
            raise Broken(f"accounts and legs differ: {[job.key for job in self.jobs.values() if job.running]}")
        if {key: job for key, job in self.jobs.items() if job.running} != self.started:
            raise Broken(f"started are {list(self.started)}, and others run")
        attempts = {(job.rid, key) for key, job in self.jobs.items()}
        if attempts != {(rid, key) for rid, keys in self._attempts.items() for key in keys}:
            raise Broken(f"jobs and their index differ: {self._attempts}")
        self.leaving.check(self.jobs.values())
