"""The prefill scheduler of a worker: queue -> order -> chunk -> offer -> first token, with a KV send after each chunk.

Choices that came in one Assign share all that, and each gets its own first token. Whatever the broker is told, it is
told of each choice. A choice stays, with its first token, until the broker closes it: until then the broker can ask for
it again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

from tetri.core.actions import Action, AddRequest, Broken, CancelRequest, Exported, HoldRequest
from tetri.core.instance.activity import ActivityLog
from tetri.core.instance.ledger import Ledger
from tetri.core.instance.peers import Peers
from tetri.core.length.estimator import LengthEstimator
from tetri.core.prefill.dispatcher import Dispatcher
from tetri.core.prefill.kv_send import KVSend
from tetri.core.prefill.length_wait import LengthWait
from tetri.core.prefill.queue import Queue, candidates, fill, groups, overtaking, ran
from tetri.core.prefill.request import KVOutflow, PrefillChoice, PrefillRequest, choices_of, key_of
from tetri.core.timers import Timers
from tetri.cost import CorrectedCost
from tetri.engine_request import EngineRequest, Sampled, Span, StepDone
from tetri.policy.views import Progress, QueuedPrompt
from tetri.request import Stage, blocks_for
from tetri.wire.messages import Assign, End, Failed, Hold, Resend, Staged, TokenItem, Tokens

OVERTAKEN_S = 1.0  # so long hand-overs may get memory that the first prompt waits for
MOST_FAILED = 1024  # attempts that were given up here and are still known


class PrefillScheduler:
    """Schedules the prefill phase.

    requests   all of which the broker has not closed every choice, by key
    choices    the same by the keys of all their choices, closed ones included
    expected   the planned chunk
    budget     tokens of the planned step that prefill may use
    arrived    requests that were ever assigned, and `arrived_s` the predicted seconds of their prefill in full chunks
    decodes    their choices that decode
    ttft_s     the limit of TTFT of the last of them; 0: it had none
    """

    def __init__(
        self,
        ledger: Ledger,
        peers: Peers,
        timers: Timers[str],
        rng: Random,
        estimator: LengthEstimator | None,
        activity: ActivityLog,
        cost: CorrectedCost,
    ) -> None:
        own = peers.own
        self.own, self.ledger, self.activity, self.cost = own, ledger, activity, cost
        self.requests: dict[str, PrefillRequest] = {}
        self.choices: dict[str, PrefillRequest] = {}
        self.queue = Queue(own)
        self.dispatcher = Dispatcher(own, self.requests, peers, timers, rng, activity)
        self.kv_send = KVSend(own, self.dispatcher, activity)
        self.lengths = LengthWait(own, self.dispatcher, estimator)
        self.expected: list[Span] = []
        self.budget = 0
        self._attempts: dict[str, dict[str, PrefillChoice]] = {}  # rid -> its attempts here, by key
        self._failed: dict[str, Action] = {}  # key of an attempt that was given up -> its Failed, oldest first
        self._arrivals = self._turns = 0
        self.arrived, self.arrived_s, self.decodes = 0, 0.0, 0
        self.ttft_s = 0.0
        self._lacking: tuple[PrefillRequest, float] | None = None  # the first prompt, and since when it lacks memory

    @property
    def slots_used(self) -> int:
        """Slots of the own slab that are not free."""
        return self.kv_send.used

    # ------------------------------------------------------------ messages

    def assign(self, message: Assign, now: float) -> list[Action]:
        """Queue choices, and forget their earlier attempts. Report Failed when they can never fit, and again for one
        that was given up here: another prefill could write another first token, which the broker may have. One that is
        here already goes on as it is."""
        fresh: list[PrefillChoice] = []
        actions: list[Action] = []
        for choice in choices_of(message):
            if choice.key in self._failed:
                actions.append(self._failed[choice.key])
            elif choice.key not in self.choices:  # otherwise a resent Assign
                actions += self.close(choice.rid, choice.attempt - 1)
                fresh.append(choice)
        if not fresh:
            return actions
        own, tokens = self.own, len(message.prompt) + len(message.output)
        blocks = blocks_for(tokens, own.capacity.block_tokens)
        if not 0 < tokens < own.capacity.context or blocks > own.capacity.blocks:
            why = f"{tokens} tokens do not fit into instance {own.iid}"
            return [*actions, *(self._failure(choice, why, retry=False) for choice in fresh)]
        request = self._queued(message, fresh, KVOutflow(blocks), now)
        return [*actions, *self.lengths.arrived(request)]

    def _queued(self, message: Assign, choices: list[PrefillChoice], flow: KVOutflow, now: float) -> PrefillRequest:
        """Queue these choices of an Assign as one request."""
        self._arrivals += 1
        own, key, prompt, output = self.own, choices[0].key, tuple(message.prompt), tuple(message.output)
        tokens = len(prompt) + len(output)
        left_s = own.cost.prompt_s(tokens, 0, own.capacity.chunk_tokens)
        ends = [end_s for end_s in (message.deadline_s, message.slo.ttft_s) if end_s is not None]
        due = now + min(ends) if ends else None
        self.arrived += 1
        self.arrived_s += own.cost.shared_s(tokens, own.capacity.chunk_tokens) * self.cost.prefill
        self.decodes += len(choices) if len(output) + 1 < message.sampling.max_tokens else 0
        if not output:
            self.ttft_s = max(message.slo.ttft_s or 0.0, 0.0)
        queued = QueuedPrompt(key, self._arrivals, tokens, now, left_s * self.cost.prefill, due)
        sampling = message.sampling
        if choices[0].rid != message.rid:
            sampling = sampling.changed(seed=choices[0].seed)
        request = self.requests[key] = PrefillRequest(
            *(key, choices, prompt, output, sampling, queued, flow, tokens, left_s),
            alone=message.alone,
            lost=tuple(message.lost),
            avoid=tuple(message.avoid),
            pinned=message.pinned,
            slo=message.slo,
        )
        for choice in choices:
            self.choices[choice.key] = request
            self._attempts.setdefault(choice.rid, {})[choice.key] = choice
        self.queue.enter(request)
        return request

    def close(self, rid: str, attempt: int) -> list[Action]:
        """Close every attempt of a choice up to `attempt`, in any stage, and forget the requests that it ends."""
        actions: list[Action] = []
        for key, choice in [*self._attempts.get(rid, {}).items()]:
            if choice.attempt <= attempt and not choice.closed:
                choice.closed = True
                actions += self._settle(self.choices[key], "closed")
        return actions

    def _settle(self, request: PrefillRequest, why: str) -> list[Action]:
        """Forget a request of which all choices are closed. Send no more KV of one of which none goes on."""
        if all(choice.closed for choice in request.choices):
            return self._forget(request, why)
        return [] if request.decodes or not request.computed else self._end(request)

    def reject(self, key: str, why: str) -> list[Action]:
        """Fail a request that the engine can never run, and give its part of the chunk to the others."""
        request = self.requests[key]
        others = [self.requests[span.key] for span in self.expected if span.key != key]
        actions = self.give_up(request, why, retry=False)
        self._choose([Progress(other.key, other.done, other.goal) for other in others])
        return [*actions, *self.holding()]

    def resend(self, message: Resend) -> list[Action]:
        """Send the output tokens from index `message.start` on again."""
        key = key_of(message.rid, message.attempt)
        choice = self._attempts.get(message.rid, {}).get(key)
        if choice is None or choice.closed:
            return []
        ids = self.choices[key].outputs(choice)[message.start :]
        item = TokenItem(choice.rid, choice.attempt, message.start, ids, choice.end)
        return [self.own.report(Tokens, items=[item])] if ids or choice.end else []

    # ------------------------------------------------------------ the next chunk

    def plan(self, budget: int, free: int, now: float) -> list[Action]:
        """Choose the next chunk, of up to `budget` tokens, and add its requests to the engine: new ones only as far as
        `free` KV blocks suffice.

        If slots are short for any chunk, start the first prompt all the same, so that it is offered: once granted, it
        may use the reserve. One that stays here needs no slots, and goes on at once."""
        self.budget, most = budget, self.own.capacity.max_batch
        self._look_for_memory(free, now)
        for chosen in (overtaking, candidates):
            prompts = chosen(self.queue, self.requests, budget, free, most)
            self._choose(prompts)
            if self.expected:
                break
        keys = [span.key for span in self.expected]
        if self.queue.short and not self.dispatcher.waiting():
            keys = [prompts[0].key]
        fresh = [self.requests[key] for key in keys if not self.requests[key].running]
        actions = [action for request in fresh for action in self._start(request, now)]
        if self.queue.short and any(request.flow.stays for request in fresh):
            self._choose([prompt for prompt in prompts if self.requests[prompt.key].running])
        return actions

    def _look_for_memory(self, free: int, now: float) -> None:
        key = self.queue.first_unstarted()
        first = None if key is None else self.requests[key]
        if first is None or first.flow.blocks <= free:
            self._lacking = None
        elif self._lacking is None or self._lacking[0] is not first:
            self._lacking = first, now

    def overtaken(self, now: float) -> int:
        """Return the blocks of the first prompt, if it has lacked memory for OVERTAKEN_S: hand-overs that came later
        may have got what was free."""
        return self._lacking[0].flow.blocks if self._lacking and now - self._lacking[1] >= OVERTAKEN_S else 0

    def in_order(self) -> Iterator[PrefillRequest]:
        """Yield the queued requests in the order in which their prompts are computed, as far as it is known."""
        overtaking = dict[str, None]()
        for key in self.queue.overtaking():
            overtaking[key] = None
            yield self.requests[key]
        yield from self.queue.started.values()
        for key in self.queue.first(1):
            if key not in self.queue.started and key not in overtaking:
                yield self.requests[key]

    def _choose(self, prompts: list[Progress]) -> None:
        self.expected, self.queue.short = [], False
        if not prompts:
            return
        slots = self.kv_send.spare()
        for group, started in groups(prompts, self.requests, self.queue.started):
            if not self.expected:
                self.expected = fill(self.own, self.budget, group, self.requests, started, slots)
        self.queue.short = not self.expected

    def lone(self) -> PrefillRequest | None:
        """Return the request that the planned chunk computes alone because it must be alone, or None."""
        first = self.requests[self.expected[0].key] if self.expected else None
        return first if first is not None and first.alone else None

    def plan_alone(self, request: PrefillRequest | None) -> None:
        """Plan a chunk of this started request alone, as large as possible, or no chunk. It is none, too, if slots are
        short."""
        self.budget = self.own.capacity.chunk_tokens
        self._choose([] if request is None else [Progress(request.key, request.done, request.goal)])

    def _start(self, request: PrefillRequest, now: float) -> list[Action]:
        if not self.ledger.allocate(request.key, request.flow.blocks):
            raise Broken(f"{request.key} was planned without room")
        self.queue.start(request)
        tokens = request.prompt + request.output
        siblings = tuple([(choice.key, choice.seed or 0) for choice in request.choices[1:] if not choice.closed])
        engine_request = EngineRequest(request.key, "prefill", tokens, len(request.prompt), request.sampling, siblings)
        self._turns += 1
        request.turn = self._turns
        self.lengths.started(request, self.expected)
        self.dispatcher.started(request, now)
        return [AddRequest(engine_request), *self._stage(request, Stage.PREFILL), *self.dispatcher.dispatch(now)]

    def holding(self) -> list[Action]:
        """Hold the started requests that are not in the planned chunk, and release those that are."""
        planned = {span.key for span in self.expected}
        actions: list[Action] = []
        for key, request in self.queue.started.items():
            if request.held == (key in planned):
                request.held = not request.held
                actions.append(HoldRequest(key, request.held))
        return actions

    def holds_up(self, request: PrefillRequest) -> bool:
        """Return whether the request waits for slots ahead of others that a decode instance could hold."""
        if self.queue.blocked() is not request:
            return False
        others = [self.requests[key] for key in (*self.queue.raw, *self.queue.line)]
        return any(not other.decodes or self.dispatcher.pool.fits(other) for other in others)

    def free_memory(self, rid: str, blocks: int) -> list[Action]:
        """Free the KV blocks of the blocked request for request `rid`, which needs `blocks` to decode here. Otherwise
        two mixed instances could wait for each other's memory for ever. When two requests are on offer to each other's
        instances, the one with the lower id wins on both. One that is on offer here yields to any: it may wait for the
        slots of the other."""
        request = self.queue.blocked()
        if request is None or any(choice.rid == rid for choice in request.choices):
            return []
        flow = request.flow
        if flow.offer is not None and flow.target != self.own.iid and flow.choices[0].rid < rid:
            return []
        enough = self.ledger.free + flow.blocks >= blocks
        return self.retreat(request, "its memory was given to a request that decodes here") if enough else []

    def retreat(self, request: PrefillRequest, why: str) -> list[Action]:
        """Free the KV blocks and slots of a started request that no decode instance has granted. It starts again later,
        behind the started ones."""
        self.activity.happened("preempted", request.lead, note=why)
        self._stop(request)
        self.queue.computed(request, 0)
        request.turn = 0
        actions = [CancelRequest(request.key), *self.dispatcher.forget(request, why), *self.kv_send.drain(request)]
        request.flow = KVOutflow(request.flow.blocks)
        return actions

    # ------------------------------------------------------------ what the step did

    def step_done(self, done: StepDone, *, strained: bool) -> list[Action]:
        """Report first tokens, and settle the lengths that the step has shown.

        `strained`: memory was short, or the engine computed a preempted decode again, so it may have run more or fewer
        tokens of the chunk than planned. Raise Broken when the engine ran anything else."""
        planned, self.expected = self.expected, []
        if not ran(planned, done.spans, self.requests, strained=strained):
            raise Broken(f"planned {planned}, the engine ran {list(done.spans)}")
        for span in done.spans:
            request = self.requests[span.key]
            self.queue.computed(request, span.stop)
            self.activity.computed("chunk", request.lead, span.start, span.stop)
        actions = self._first_tokens(done.tokens)
        actions += self.lengths.stepped(planned, done.estimates)
        for key in done.preempted:
            self.activity.happened("preempted", self.requests[key].lead)
            self.queue.computed(self.requests[key], 0)
        return actions

    def place(self, done: StepDone, now: float) -> list[Action]:
        """Once all that the step did is recorded, offer the requests whose length is known since: one that stays here
        may replace an earlier attempt of itself in the batch. Then export the KV blocks that the chunk completed, of
        those that do not stay."""
        actions = self.lengths.place(now)
        for span in done.spans:
            actions += self.kv_send.export(self.requests[span.key])
        return actions

    def exported(self, event: Exported) -> list[Action]:
        """Announce a chunk that is in the slab now."""
        return self.kv_send.exported(self.requests.get(event.key), event)

    def _first_tokens(self, tokens: Sequence[Sampled]) -> list[Action]:
        items: list[TokenItem] = []
        requests: dict[str, PrefillRequest] = {}
        for sampled in tokens:
            request = self.choices[sampled.key]
            choice = next(choice for choice in request.choices if choice.key == sampled.key)
            if request.done != request.goal or choice.computed:
                raise Broken(f"a token for {choice.key} at {request.done} of {request.goal}")
            reason = sampled.reason or ("length" if len(request.output) + 1 >= request.sampling.max_tokens else None)
            if reason:
                choice.end = End(reason=reason, receipt=request.receipt(self.own.iid), error=sampled.error)
            choice.token = None if sampled.error else sampled.ids[-1]
            requests[request.key], request.computed_at = request, self.activity.now
            if not choice.closed:
                items.append(TokenItem(choice.rid, choice.attempt, len(request.output), list(sampled.ids), choice.end))
        after = [action for request in requests.values() for action in self._computed(request)]
        return [self.own.report(Tokens, items=items, step=self.activity.step), *after] if requests else []

    def _computed(self, request: PrefillRequest) -> list[Action]:
        """Go on with a request that has its first tokens."""
        if not all(choice.computed or choice.closed for choice in request.choices):
            raise Broken(f"{request.key} has no token for some of its choices")
        if request.flow.stays and request.decodes:
            return self._stays(request)
        self._stop(request)
        self.queue.leave(request)
        return self._stage(request, Stage.MOVING) if request.decodes else self._end(request)

    def _stays(self, request: PrefillRequest) -> list[Action]:
        """Go on as a decode request of this engine, with the same blocks."""
        flow, token, home = request.flow, request.choices[0].token, self.dispatcher.pool.home
        assert home is not None and token is not None
        self.queue.stop(request)
        self.queue.leave(request)
        self.ledger.hand_on(request.key, flow.stays)
        flow.stayed()
        self.dispatcher.timers.clear(request.key)
        return home.land(flow.stays, token)

    def _stop(self, request: PrefillRequest) -> None:
        """Record that its engine request is no longer in the engine, and free its KV blocks."""
        self.queue.stop(request)
        self.ledger.close(request.key)

    def _end(self, request: PrefillRequest) -> list[Action]:
        """Send no more KV: no choice goes on."""
        return [*self.dispatcher.forget(request, "finished"), *self.kv_send.drain(request)]

    # ------------------------------------------------------------ giving up

    def give_up(
        self, request: PrefillRequest, why: str, *, retry: bool = True, avoid: Sequence[str] = (), lost: str = ""
    ) -> list[Action]:
        """Close the choices of a request that cannot go on here, and report each as Failed. `retry`, `avoid` and `lost`
        as there. Those that ended with their first token stay."""
        failures: list[Action] = []
        for choice in request.open():
            choice.closed = True
            failure = self._failed[choice.key] = self._failure(choice, why, retry=retry, avoid=list(avoid), lost=lost)
            failures.append(failure)
        while len(self._failed) > MOST_FAILED:
            del self._failed[next(iter(self._failed))]
        return [*self._settle(request, why), *failures]

    def _failure(self, choice: PrefillChoice, why: str, **fields: Any) -> Action:
        return self.own.report(Failed, rid=choice.rid, attempt=choice.attempt, why=why, **fields)

    def lost_with(self, request: PrefillRequest, iid: str) -> list[Action]:
        """Report that a decode instance was lost that may have decoded the request, which goes on elsewhere."""
        request.lost = (*request.lost, iid)
        return self._stage(request, Stage.MOVING, peer="", lost=iid)

    def slot_deadlock(self) -> PrefillRequest | None:
        """Return the request to give up because a granted one waits for its slots; None without a deadlock."""
        queue = self.queue
        waiting_for_slots = queue.short and any(request.granted for request in queue.started.values())
        return self.kv_send.slot_deadlock() if waiting_for_slots else None

    def _forget(self, request: PrefillRequest, why: str) -> list[Action]:
        del self.requests[request.key]
        for choice in request.choices:
            del self.choices[choice.key], self._attempts[choice.rid][choice.key]
            if not self._attempts[choice.rid]:
                del self._attempts[choice.rid]
        if not request.computed:
            self.queue.leave(request)
        cancel: list[Action] = [CancelRequest(request.key)] if request.running else []
        if request.running:
            self._stop(request)
        self.expected = [span for span in self.expected if span.key != request.key]
        return [*cancel, *self.dispatcher.forget(request, why), *self.kv_send.drain(request)]

    # ------------------------------------------------------------ reports

    def holds(self) -> list[Hold]:
        """Return the choices for the heartbeat."""
        return [
            Hold(choice.rid, choice.attempt, request.stage(choice), len(request.output) + (choice.token is not None))
            for request in self.requests.values()
            for choice in request.choices
            if not choice.closed
        ]

    def _stage(self, request: PrefillRequest, stage: Stage, **fields: Any) -> list[Action]:
        fields = {"stage": stage, "peer": request.flow.target, **fields}
        return [
            self.own.report(Staged, rid=choice.rid, attempt=choice.attempt, **fields) for choice in request.open()
        ]

    def check(self) -> None:
        """Raise Broken when requests, engine requests, ledger and indexes disagree."""
        self.queue.check(self.requests)
        running = {key: request for key, request in self.requests.items() if request.running}
        if any((request.key in self.ledger) != request.running for request in self.requests.values()):
            raise Broken(f"accounts and engine requests differ: {list(running)}")
        if running != self.queue.started:
            raise Broken(f"started are {list(self.queue.started)}, and others run")
        every = [(request, choice) for request in self.requests.values() for choice in request.choices]
        attempts = {(choice.rid, choice.key) for _, choice in every}
        if attempts != {(rid, key) for rid, keys in self._attempts.items() for key in keys}:
            raise Broken(f"requests and their index differ: {self._attempts}")
        if {choice.key: request.key for request, choice in every} != {k: each.key for k, each in self.choices.items()}:
            raise Broken(f"requests and the index of their choices differ: {list(self.choices)}")
        if any(all(choice.closed for choice in request.choices) for request in self.requests.values()):
            raise Broken("a request without a choice is still here")
        self.kv_send.check(self.requests.values())
