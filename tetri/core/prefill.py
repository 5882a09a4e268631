"""The prefill half of a worker: queue -> order -> chunk -> offer -> first token -> KV leaves, chunk by chunk.

A job is kept, with its first token, until the broker closes it: until then the broker can ask for it again.
"""

from __future__ import annotations

from typing import Any

from tetri.core.actions import BROKER, Action, AddLeg, Broken, CancelLeg, Export, Exported, Free, Send
from tetri.core.dispatch import Dispatcher
from tetri.core.job import Job
from tetri.core.kvflow import Outflow, Parcel
from tetri.core.ledger import Ledger
from tetri.core.peers import Identity
from tetri.leg import Leg, Sampled, Span
from tetri.policy.rules import CHUNKS, ORDERS
from tetri.policy.views import Progress, QueuedPrompt
from tetri.request import Receipt, Stage, blocks_for
from tetri.wire.messages import Assign, Failed, Finished, Hold, Resend, Staged, TokenItem, Tokens, WorkerEvent


class Prefill:
    """`jobs` by key; `raw` in order of arrival, `line` in order of execution, both hold keys of `jobs` whose
    tokens are not all computed."""

    def __init__(self, own: Identity, ledger: Ledger, dispatcher: Dispatcher) -> None:
        self.own, self.ledger, self.dispatcher = own, ledger, dispatcher
        self.jobs: dict[str, Job] = dispatcher.jobs
        self.raw: list[str] = []
        self.line: list[str] = []
        self.slots_taken = 0
        self.short = False  # the first in line waits for slots
        self.expected: list[Span] = []
        self._arrivals = self._turns = 0

    # ------------------------------------------------------------ what comes in

    def assign(self, message: Assign) -> list[Action]:
        key = f"p:{message.rid}:{message.attempt}"
        if key in self.jobs:
            return []  # the broker was not sure that it had reached us
        actions = self.close(message.rid, message.attempt - 1)
        tokens = len(message.prompt) + len(message.output)
        blocks = blocks_for(tokens, self.own.capacity.block_tokens)
        if not 0 < tokens < self.own.capacity.context or blocks > self.own.capacity.blocks:
            why = f"{tokens} tokens do not fit into instance {self.own.iid}"
            return [
                *actions,
                self._tell(Failed, rid=message.rid, attempt=message.attempt, why=why, retry=False),
            ]
        self._arrivals += 1
        self.jobs[key] = Job(
            key,
            message.rid,
            message.attempt,
            tuple(message.prompt),
            tuple(message.output),
            message.sampling,
            self._arrivals,
            Outflow(blocks),
        )
        self.raw.append(key)
        return actions

    def close(self, rid: str, attempt: int) -> list[Action]:
        """Let go of every attempt up to this one, in any stage."""
        actions: list[Action] = []
        for job in [job for job in self.jobs.values() if job.rid == rid and job.attempt <= attempt]:
            actions += self._forget(job, "closed")
        return actions

    def reject(self, key: str, why: str) -> list[Action]:
        """The engine cannot run this leg: the others of the chunk get its place."""
        job = self.jobs[key]
        others = [self.jobs[span.key] for span in self.expected if span.key != key]
        self.expected = self._pack([Progress(other.key, other.done, other.goal) for other in others])
        return [*self._forget(job, why), self._fail(job, why, retry=False)]

    def resend(self, message: Resend) -> list[Action]:
        job = self.jobs.get(f"p:{message.rid}:{message.attempt}")
        if job is None:
            return []
        actions: list[Action] = []
        if ids := job.outputs()[message.start :]:
            item = TokenItem(job.rid, job.attempt, message.start, ids, job.end.reason if job.end else None)
            actions.append(self._tell(Tokens, items=[item]))
        return [*actions, *([Send(BROKER, job.end)] if job.end else [])]

    # ------------------------------------------------------------ the next chunk

    def plan(self, now: float) -> list[Action]:
        """Choose the next chunk and hand the engine just the legs that fill it. `expected` is the chunk."""
        self._fill_line()
        self.expected = self._next_chunk()
        actions: list[Action] = []
        for job in [self.jobs[span.key] for span in self.expected]:
            if not job.running:
                actions += self._start(job, now)
        return actions

    def _fill_line(self) -> None:
        """Order windows of the queue, no more than it takes to fill a chunk: whoever comes later is ordered with
        more company. A window never goes before an earlier one, which bounds how long a prompt is passed over."""
        tokens = sum(self.jobs[key].goal - self.jobs[key].done for key in self.line)
        while self.raw and tokens < self.own.capacity.chunk_tokens:
            window, self.raw = self.raw[: self.own.sched_batch], self.raw[self.own.sched_batch :]
            prompts = [QueuedPrompt(key, self.jobs[key].arrival, self.jobs[key].goal) for key in window]
            self.line += ORDERS[self.own.rules.order](prompts)
            tokens += sum(prompt.tokens for prompt in prompts)

    def _next_chunk(self) -> list[Span]:
        spans = self._pack(self._candidates())
        slots, self.short = self.own.slots - self.slots_taken, False
        for place, span in enumerate(spans):
            start, stop = self._filled(self.jobs[span.key], span.stop)
            slots -= stop - start
            if slots < 0:  # the KV of earlier chunks must leave first
                self.short = place == 0
                return spans[:place]
        return spans

    def _pack(self, prompts: list[Progress]) -> list[Span]:
        return CHUNKS[self.own.rules.chunk](prompts, self.own.capacity.chunk_tokens)

    def _candidates(self) -> list[Progress]:
        """The prompts that may be in the next chunk: the engine has their leg, or there is room for it."""
        free, prompts = self.ledger.free, []
        for key in self.line[: self.own.capacity.max_batch]:
            job = self.jobs[key]
            free -= 0 if job.running else job.flow.blocks
            if free < 0 and not job.running:
                break
            prompts.append(Progress(key, job.done, job.goal))
        return prompts

    def _filled(self, job: Job, done: int) -> tuple[int, int]:
        """Blocks [start, stop) that are complete, and not exported, once `done` tokens are computed. None of a
        request that its first token ends: nobody would take them out of the store."""
        if not job.decodes:
            return job.flow.exported, job.flow.exported
        stop = job.flow.blocks if done == job.goal else done // self.own.capacity.block_tokens
        return job.flow.exported, stop

    def _start(self, job: Job, now: float) -> list[Action]:
        if not self.ledger.take(job.key, job.flow.blocks):
            raise Broken(f"{job.key} was planned without room")
        self._turns += 1
        job.turn, job.running = self._turns, True
        leg = Leg(job.key, "prefill", job.prompt + job.output, len(job.prompt), job.sampling)
        staged = self._tell(Staged, rid=job.rid, attempt=job.attempt, stage=Stage.PREFILL)
        return [AddLeg(leg), staged, *self.dispatcher.dispatch(now)]

    # ------------------------------------------------------------ what the step did

    def step_done(self, spans: list[Span], tokens: list[Sampled]) -> list[Action]:
        """Tokens go out first, then the KV of the blocks that this chunk filled."""
        if sorted(spans, key=_span_key) != sorted(self.expected, key=_span_key):
            raise Broken(f"planned {self.expected}, the engine ran {spans}")
        self.expected = []
        for span in spans:
            self.jobs[span.key].done = span.stop
        actions = self._first_tokens(tokens)
        for span in spans:
            actions += self._export(self.jobs[span.key])
        return actions

    def _first_tokens(self, tokens: list[Sampled]) -> list[Action]:
        items: list[TokenItem] = []
        after: list[Action] = []
        for sampled in tokens:
            job = self.jobs[sampled.key]
            if job.done != job.goal or job.token is not None:
                raise Broken(f"a token for {job.key} at {job.done} of {job.goal}")
            reason = sampled.reason or (None if job.decodes else "length")
            items.append(TokenItem(job.rid, job.attempt, len(job.output), list(sampled.ids), reason))
            job.token, job.running = sampled.token, False
            self.line.remove(job.key)
            self.ledger.close(job.key)
            after += self._end(job, reason) if reason else self._move(job)
        return [self._tell(Tokens, items=items), *after] if items else []

    def _move(self, job: Job) -> list[Action]:
        staged = self._tell(Staged, rid=job.rid, attempt=job.attempt, stage=Stage.MOVING, peer=job.flow.target)
        return [staged]

    def _end(self, job: Job, reason: str) -> list[Action]:
        """The first token ends the request: no more KV moves."""
        receipt = Receipt(prompt_tokens=len(job.prompt), prefill_instance=self.own.iid)
        job.end = Finished(
            iid=self.own.iid,
            incarnation=self.own.incarnation,
            rid=job.rid,
            attempt=job.attempt,
            reason=reason,
            outputs=len(job.output) + 1,
            receipt=receipt,
        )
        return [Send(BROKER, job.end), *self.dispatcher.withdraw(job, "finished"), *self._free(job)]

    def _export(self, job: Job) -> list[Action]:
        start, stop = self._filled(job, job.done)
        if stop == start:
            return []
        index = job.flow.chunks
        job.flow.chunks, job.flow.exported = index + 1, stop
        self.slots_taken += stop - start
        return [Export(job.key, index, start, stop)]

    def exported(self, event: Exported) -> list[Action]:
        job = self.jobs.get(event.key)
        if job is None or job.end is not None:
            return self.free(event.handle.slots, Free(event.handle))
        token = job.token if event.stop == job.flow.blocks else None
        parcel = Parcel(event.index, event.start, event.stop, event.handle, event.digest, token)
        job.flow.put(parcel)
        return self.dispatcher.announce(job, parcel)

    # ------------------------------------------------------------ letting go

    def free(self, slots: list[int], action: Free) -> list[Action]:
        self.slots_taken -= len(slots)
        return [action]

    def _free(self, job: Job) -> list[Action]:
        handles = job.flow.drain()
        self.slots_taken -= sum(len(handle.slots) for handle in handles)
        return [Free(handle) for handle in handles]

    def landed(self, job: Job, index: int) -> list[Action]:
        handle = job.flow.land(index)
        return [] if handle is None else self.free(handle.slots, Free(handle))

    def lose(self, job: Job, why: str) -> list[Action]:
        """Part of its KV is gone with a decode instance: only another attempt helps."""
        return [*self._forget(job, why), self._fail(job, why, retry=True)]

    def jammed(self) -> Job | None:
        """The first in line when it waits for slots which only requests keep that nobody takes, perhaps because
        of the very memory that it has been granted: no slot and no memory would ever come free."""
        job = self.jobs[self.line[0]] if self.line and self.short else None
        waits = job is not None and job.running and job.flow.offer is not None
        return job if waits and all(j.unplaced for j in self.jobs.values() if j.flow.parcels) else None

    def give_way(self, job: Job) -> list[Action]:
        why = "an older request goes first"
        return self.dispatcher.withdraw(job, why) if job.flow.movable else self.lose(job, why)

    def strand(self, job: Job, why: str) -> list[Action]:
        return [*self._forget(job, why), self._fail(job, why, retry=False)]

    def _forget(self, job: Job, why: str) -> list[Action]:
        del self.jobs[job.key]
        for queue in (self.raw, self.line):
            if job.key in queue:
                queue.remove(job.key)
        self.ledger.close(job.key)
        cancel: list[Action] = [CancelLeg(job.key)] if job.running else []
        return [*cancel, *self.dispatcher.withdraw(job, why), *self._free(job)]

    # ------------------------------------------------------------ what it says of itself

    def holds(self) -> list[Hold]:
        return [Hold(job.rid, job.attempt, job.stage, len(job.outputs())) for job in self.jobs.values()]

    def queued_tokens(self) -> int:
        return sum(self.jobs[key].goal - self.jobs[key].done for key in (*self.line, *self.raw))

    def _fail(self, job: Job, why: str, *, retry: bool) -> Action:
        return self._tell(Failed, rid=job.rid, attempt=job.attempt, why=why, retry=retry)

    def _tell(self, kind: type[WorkerEvent], **fields: Any) -> Send:
        return Send(BROKER, kind(iid=self.own.iid, incarnation=self.own.incarnation, **fields))

    def check(self) -> None:
        for key in (*self.raw, *self.line):
            if self.jobs[key].token is not None:
                raise Broken(f"{key} has its token and is still queued")
        running = [job for job in self.jobs.values() if job.running]
        if any((job.key in self.ledger) != job.running for job in self.jobs.values()):
            raise Broken(f"accounts and legs differ: {running}")
        for job in self.jobs.values():
            kept = sum(parcel.stop - parcel.start for parcel in job.flow.parcels.values())
            if job.end is None and kept + job.flow.landed > job.flow.exported:
                raise Broken(f"{job.key} moved more blocks than it exported")
        if not 0 <= self.slots_taken <= self.own.slots:
            raise Broken(f"{self.slots_taken} of {self.own.slots} slots taken")


def _span_key(span: Span) -> tuple[str, int]:
    return span.key, span.start
