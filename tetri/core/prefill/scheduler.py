"""The prefill scheduler of a worker: queue -> order -> chunk -> offer -> first token, with a KV send after each chunk.

It keeps a request, with its first token, until the broker closes it: until then the broker can ask for it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from tetri.core.actions import Action, AddRequest, Broken, CancelRequest, HoldRequest
from tetri.core.instance.ledger import Ledger
from tetri.core.instance.peers import Peers
from tetri.core.length.estimator import LengthEstimator
from tetri.core.prefill.dispatcher import Dispatcher
from tetri.core.prefill.kv_send import KVSend
from tetri.core.prefill.length_wait import LengthWait
from tetri.core.prefill.queue import Queue, candidates, fill, groups, ran
from tetri.core.prefill.request import KVOutflow, PrefillRequest
from tetri.core.timers import Timers
from tetri.engine_request import EngineRequest, Sampled, Span, StepDone
from tetri.policy.views import Progress, QueuedPrompt
from tetri.request import Stage, blocks_for
from tetri.wire.messages import Assign, End, Failed, Hold, Resend, Staged, TokenItem, Tokens

MOST_FAILED = 1024  # attempts that were given up here and are still known


class PrefillScheduler:
    """Schedules the prefill phase.

    requests   all that the broker has not closed, by key
    expected   the planned chunk
    """

    def __init__(
        self, ledger: Ledger, peers: Peers, timers: Timers[str], rng: Random, estimator: LengthEstimator | None
    ) -> None:
        own = peers.own
        self.own, self.ledger = own, ledger
        self.requests: dict[str, PrefillRequest] = {}
        self.queue = Queue(own)
        self.dispatcher = Dispatcher(own, self.requests, peers, timers, rng)
        self.kv_send = KVSend(own, self.dispatcher)
        self.lengths = LengthWait(own, self.dispatcher, estimator)
        self.expected: list[Span] = []
        self._budget = 0  # tokens of the planned step that prefill may use
        self._attempts: dict[str, dict[str, None]] = {}  # rid -> keys of its attempts here
        self._failed: dict[str, Action] = {}  # key of an attempt that was given up -> its Failed, oldest first
        self._arrivals = self._turns = 0

    @property
    def slots_used(self) -> int:
        """Slots of the own slab that are not free."""
        return self.kv_send.used

    # ------------------------------------------------------------ messages

    def assign(self, message: Assign, now: float) -> list[Action]:
        """Queue a request, and forget its earlier attempts. Report Failed when it can never fit, and again when this
        attempt was given up here: another prefill could write another first token, which the broker may have."""
        key = f"p:{message.rid}:{message.attempt}"
        if key in self.requests:
            return []  # a resent Assign
        if key in self._failed:
            return [self._failed[key]]
        actions = self.close(message.rid, message.attempt - 1)
        own, prompt, output = self.own, tuple(message.prompt), tuple(message.output)
        tokens = len(prompt) + len(output)
        blocks = blocks_for(tokens, own.capacity.block_tokens)
        if not 0 < tokens < own.capacity.context or blocks > own.capacity.blocks:
            why = f"{tokens} tokens do not fit into instance {own.iid}"
            return [*actions, own.report(Failed, rid=message.rid, attempt=message.attempt, why=why, retry=False)]
        self._arrivals += 1
        work_s = own.cost.prompt_s(tokens, 0, own.capacity.chunk_tokens)
        due = None if message.deadline_s is None else now + message.deadline_s
        queued, flow = QueuedPrompt(key, self._arrivals, tokens, now, work_s, due), KVOutflow(blocks)
        request = self.requests[key] = PrefillRequest(
            *(key, message.rid, message.attempt, prompt, output, message.sampling, queued, flow, tokens, work_s),
            alone=message.alone,
            lost=tuple(message.lost),
            avoid=tuple(message.avoid),
            pinned=message.pinned,
        )
        self._attempts.setdefault(request.rid, {})[key] = None
        self.queue.enter(request)
        return [*actions, *self.lengths.arrived(request)]

    def close(self, rid: str, attempt: int) -> list[Action]:
        """Forget every attempt of a request up to `attempt`, in any stage."""
        requests = [self.requests[key] for key in self._attempts.get(rid, ())]
        old = [request for request in requests if request.attempt <= attempt]
        return [action for request in old for action in self._forget(request, "closed")]

    def reject(self, key: str, why: str) -> list[Action]:
        """Fail a request that the engine can never run, and give its part of the chunk to the others."""
        request = self.requests[key]
        others = [self.requests[span.key] for span in self.expected if span.key != key]
        actions = self.give_up(request, why, retry=False)
        self._choose([Progress(other.key, other.done, other.goal) for other in others])
        return [*actions, *self.holding()]

    def resend(self, message: Resend) -> list[Action]:
        """Send the output tokens from index `message.start` on again."""
        request = self.requests.get(f"p:{message.rid}:{message.attempt}")
        if request is None:
            return []
        ids = request.outputs()[message.start :]
        item = TokenItem(request.rid, request.attempt, message.start, ids, request.end)
        return [self.own.report(Tokens, items=[item])] if ids or request.end else []

    # ------------------------------------------------------------ the next chunk

    def plan(self, budget: int, now: float) -> list[Action]:
        """Choose the next chunk, of up to `budget` tokens, and add its requests to the engine.

        If slots are short for any chunk, start the first prompt all the same, so that it is offered: once granted, it
        may use the reserve."""
        self._budget, most, free = budget, self.own.capacity.max_batch, self.ledger.free
        prompts = candidates(self.queue, self.requests, budget, free, most)
        self._choose(prompts)
        keys = [span.key for span in self.expected]
        if self.queue.short and not self.dispatcher.waiting():
            keys = [prompts[0].key]
        fresh = [self.requests[key] for key in keys if not self.requests[key].running]
        return [action for request in fresh for action in self._start(request, now)]

    def _choose(self, prompts: list[Progress]) -> None:
        slots, self.expected = self.kv_send.spare(), []
        for group, started in groups(prompts, self.requests, self.queue.started):
            if not self.expected:
                self.expected = fill(self.own, self._budget, group, self.requests, started, slots)
        self.queue.short = bool(prompts) and not self.expected

    def lone(self) -> PrefillRequest | None:
        """Return the request that the planned chunk computes alone because it must be alone, or None."""
        first = self.requests[self.expected[0].key] if self.expected else None
        return first if first is not None and first.alone else None

    def plan_alone(self, request: PrefillRequest | None) -> None:
        """Plan a chunk of this started request alone, as large as possible, or no chunk. It is none, too, if slots are
        short."""
        self._budget = self.own.capacity.chunk_tokens
        self._choose([] if request is None else [Progress(request.key, request.done, request.goal)])

    def _start(self, request: PrefillRequest, now: float) -> list[Action]:
        if not self.ledger.allocate(request.key, request.flow.blocks):
            raise Broken(f"{request.key} was planned without room")
        self.queue.start(request)
        tokens = request.prompt + request.output
        engine_request = EngineRequest(request.key, "prefill", tokens, len(request.prompt), request.sampling)
        self._turns += 1
        request.turn = self._turns
        self.lengths.started(request, self.expected)
        self.dispatcher.started(request, now)
        return [AddRequest(engine_request), self._stage(request, Stage.PREFILL), *self.dispatcher.dispatch(now)]

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
        instances, the one with the lower id wins on both."""
        request = self.queue.blocked()
        if request is None or request.rid == rid or (request.flow.offer is not None and request.rid < rid):
            return []
        enough = self.ledger.free + request.flow.blocks >= blocks
        return self.retreat(request, "its memory was given to a request that decodes here") if enough else []

    def retreat(self, request: PrefillRequest, why: str) -> list[Action]:
        """Free the KV blocks and slots of a started request that no decode instance has granted. It starts again later,
        behind the started ones."""
        self._stop(request)
        self.queue.computed(request, 0)
        request.turn = 0
        actions = [CancelRequest(request.key), *self.dispatcher.forget(request, why), *self.kv_send.drain(request)]
        request.flow = KVOutflow(request.flow.blocks)
        return actions

    # ------------------------------------------------------------ what the step did

    def step_done(self, done: StepDone, now: float, *, strained: bool) -> list[Action]:
        """Report first tokens, then export the KV blocks that this chunk completed.

        `strained`: memory was short, or the engine computed a preempted decode again, so it may have run more or fewer
        tokens of the chunk than planned. Raise Broken when the engine ran anything else."""
        planned, self.expected = self.expected, []
        if not ran(planned, done.spans, self.requests, strained=strained):
            raise Broken(f"planned {planned}, the engine ran {list(done.spans)}")
        for span in done.spans:
            self.queue.computed(self.requests[span.key], span.stop)
        actions = self._first_tokens(done.tokens)
        actions += self.lengths.stepped(planned, done.estimates, now)
        for span in done.spans:
            actions += self.kv_send.export(self.requests[span.key])
        for key in done.preempted:
            self.queue.computed(self.requests[key], 0)
        return actions

    def _first_tokens(self, tokens: Sequence[Sampled]) -> list[Action]:
        items: list[TokenItem] = []
        after: list[Action] = []
        for sampled in tokens:
            request = self.requests[sampled.key]
            if request.done != request.goal or request.token is not None:
                raise Broken(f"a token for {request.key} at {request.done} of {request.goal}")
            reason = sampled.reason or (None if request.decodes else "length")
            end = self._ended(request, reason, sampled.error) if reason else None
            items.append(TokenItem(request.rid, request.attempt, len(request.output), list(sampled.ids), end))
            request.token = None if sampled.error else sampled.token
            self._stop(request)
            self.queue.leave(request)
            after += self._end(request, end) if end else [self._stage(request, Stage.MOVING)]
        return [self.own.report(Tokens, items=items), *after] if items else []

    def _stop(self, request: PrefillRequest) -> None:
        """Record that its engine request is no longer in the engine, and free its KV blocks."""
        self.queue.stop(request)
        self.ledger.close(request.key)

    def _ended(self, request: PrefillRequest, reason: str, error: str | None) -> End:
        return End(reason=reason, receipt=request.receipt(self.own.iid), error=error)

    def _end(self, request: PrefillRequest, end: End) -> list[Action]:
        """End a request with its first token: no more KV is sent."""
        request.end = end
        return [*self.dispatcher.forget(request, "finished"), *self.kv_send.drain(request)]

    # ------------------------------------------------------------ giving up

    def give_up(
        self, request: PrefillRequest, why: str, *, retry: bool = True, avoid: Sequence[str] = (), lost: str = ""
    ) -> list[Action]:
        """Forget a request that cannot go on here, and report Failed. `retry`, `avoid` and `lost` as there."""
        rid, attempt, avoided = request.rid, request.attempt, list(avoid)
        failed = self.own.report(Failed, rid=rid, attempt=attempt, why=why, retry=retry, avoid=avoided, lost=lost)
        self._failed[request.key] = failed
        if len(self._failed) > MOST_FAILED:
            del self._failed[next(iter(self._failed))]
        return [*self._forget(request, why), failed]

    def lost_with(self, request: PrefillRequest, iid: str) -> list[Action]:
        """Report that a decode instance was lost that may have decoded the request, which goes on elsewhere."""
        rid, attempt, request.lost = request.rid, request.attempt, (*request.lost, iid)
        return [self.own.report(Staged, rid=rid, attempt=attempt, stage=Stage.MOVING, lost=iid)]

    def slot_deadlock(self) -> PrefillRequest | None:
        """Return the request to give up because a granted one waits for its slots; None without a deadlock."""
        queue = self.queue
        waiting_for_slots = queue.short and any(request.granted for request in queue.started.values())
        return self.kv_send.slot_deadlock() if waiting_for_slots else None

    def _forget(self, request: PrefillRequest, why: str) -> list[Action]:
        del self.requests[request.key], self._attempts[request.rid][request.key]
        if not self._attempts[request.rid]:
            del self._attempts[request.rid]
        if not request.computed:
            self.queue.leave(request)
        cancel: list[Action] = [CancelRequest(request.key)] if request.running else []
        if request.running:
            self._stop(request)
        return [*cancel, *self.dispatcher.forget(request, why), *self.kv_send.drain(request)]

    # ------------------------------------------------------------ reports

    def holds(self) -> list[Hold]:
        """Return the requests for the heartbeat."""
        return [Hold(each.rid, each.attempt, each.stage, len(each.outputs())) for each in self.requests.values()]

    def _stage(self, request: PrefillRequest, stage: Stage) -> Action:
        peer = request.flow.target
        return self.own.report(Staged, rid=request.rid, attempt=request.attempt, stage=stage, peer=peer)

    def check(self) -> None:
        """Raise Broken when requests, engine requests, ledger and indexes disagree."""
        self.queue.check(self.requests)
        running = {key: request for key, request in self.requests.items() if request.running}
        if any((request.key in self.ledger) != request.running for request in self.requests.values()):
            raise Broken(f"accounts and engine requests differ: {list(running)}")
        if running != self.queue.started:
            raise Broken(f"started are {list(self.queue.started)}, and others run")
        attempts = {(request.rid, key) for key, request in self.requests.items()}
        if attempts != {(rid, key) for rid, keys in self._attempts.items() for key in keys}:
            raise Broken(f"requests and their index differ: {self._attempts}")
        self.kv_send.check(self.requests.values())
