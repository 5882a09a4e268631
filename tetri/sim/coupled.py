"""Simulate coupled engines, which run prefill and decode on one instance: the paper's baseline and a current one.

Applies a policy of tetri/policy/coupled.py with a cost table. Steps without prompts are computed in one go until the
decode batch changes.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import inf

from tetri.cost import Cost
from tetri.engine_request import Span
from tetri.policy.coupled import COUPLED, CoupledLimits, CoupledView, Iteration, preempted
from tetri.policy.views import Progress
from tetri.sim.traces import Arrival

MOST_STEPS = 1 << 20  # the most steps that are computed in one go


@dataclass(slots=True)
class CoupledRequest:
    """One request of a coupled engine; times in seconds of virtual time."""

    arrival_s: float
    prompt: int
    output: int
    replica: int = -1
    first_s: float = inf
    end_s: float = inf
    preempted: int = 0
    made: int = 0  # output tokens so far
    done: int = 0  # tokens of `goal` whose KV has been computed
    goal: int = 0  # tokens to prefill: the prompt, after a preemption plus the output
    joined: int = 0  # the engine's number of decode steps when this request began to decode

    @property
    def ttft_s(self) -> float:
        """Seconds from the arrival to the first token."""
        return self.first_s - self.arrival_s

    @property
    def jct_s(self) -> float:
        """Seconds from the arrival to the last token."""
        return self.end_s - self.arrival_s


@dataclass(slots=True)
class Replica:
    """One coupled engine. `busy`: its busy intervals (start, stop), seconds; `passes`: number of forward passes.
    `kept`: tokens of memory for each request of the decode batch that no new prompt may take."""

    rule: str
    limits: CoupledLimits
    cost: Cost
    join_s: float = 0.0
    kept: int = 0
    now: float = 0.0
    busy: list[tuple[float, float]] = field(default_factory=list)
    passes: int = 0
    _waiting: deque[CoupledRequest] = field(default_factory=deque)
    _started: CoupledRequest | None = None
    _decoding: dict[str, CoupledRequest] = field(default_factory=dict)  # oldest first
    _ends: list[tuple[int, str]] = field(default_factory=list)  # a heap: (last decode step, key)
    _keys: int = 0
    _steps: int = 0  # decode steps so far
    _context: int = 0  # KV tokens of the decode batch
    _reserved: int = 0  # KV tokens reserved for prompts in prefill
    _queued: int = 0  # tokens of the prompts that have not been prefilled
    _finished: int = 0  # tokens of the prompts that the last step finished
    _promised: int = 0  # KV tokens that the open requests have at their ends

    @property
    def open(self) -> int:
        """Number of requests on this replica that have not ended."""
        return len(self._waiting) + len(self._decoding) + (self._started is not None)

    def queued(self, now: float) -> int:
        """Tokens of the prompts here whose prefill has not ended by `now`, to which this replica has advanced."""
        return self._queued + (self._finished if self.now > now else 0)

    def add(self, request: CoupledRequest) -> None:
        """Queue a request that arrives now."""
        if not self.open:
            self.now = max(self.now, request.arrival_s)
        request.goal = request.prompt
        self._queued += request.goal
        self._promised += request.prompt + request.output
        self._waiting.append(request)

    def advance(self, until: float) -> None:
        """Run every iteration that begins before `until`, in seconds. Raises ValueError if nothing can run."""
        while self.now < until and self.open:
            self._free_memory()
            plan = self._plan() if self._waiting or self._started is not None else None
            if plan is not None and plan.spans:
                self._step(plan)
            else:
                self._decode(until)

    @property
    def spare(self) -> int:
        """Tokens of memory that the open requests leave when each has all of its output."""
        return self.limits.kv_tokens - self._promised

    @property
    def _free(self) -> int:
        return self.limits.kv_tokens - self._context - self._reserved

    def _free_memory(self) -> None:
        if self._free >= len(self._decoding):
            return
        if self._started is not None:
            self._give_up(self._started)
            self._started = None
        held = [self._tokens(request) for request in self._decoding.values()]
        for _ in range(preempted(held, self._free)):
            _, request = self._decoding.popitem()
            self._context -= self._tokens(request)
            request.made += self._steps - request.joined
            self._give_up(request)

    def _give_up(self, request: CoupledRequest) -> None:
        """Preempt a request: its KV is freed and computed again later; its output tokens remain."""
        if request is self._started:
            self._reserved -= request.goal
            self._queued -= request.goal
        request.preempted += 1
        request.done, request.goal = 0, request.prompt + request.made
        self._queued += request.goal
        self._waiting.appendleft(request)

    def _tokens(self, request: CoupledRequest) -> int:
        return request.goal + self._steps - request.joined

    def _plan(self) -> Iteration:
        slots = self.limits.slots - len(self._decoding) - (self._started is not None)
        request = self._started
        started = None if request is None else Progress("started", request.done, request.goal)
        batch = len(self._decoding)
        again = bool(self._waiting and self._waiting[0].preempted)
        free = self._free if again else self._free - self.kept * batch
        waiting = self._first_waiting(slots, free)
        return COUPLED[self.rule](CoupledView(started, waiting, batch, free), self.limits)

    def _first_waiting(self, most: int, free: int) -> list[Progress]:
        """The prompts that may start now: those that follow find no space in the iteration, or no memory."""
        waiting, tokens = list[Progress](), 0
        for number, request in enumerate(islice(self._waiting, max(most, 0))):
            waiting.append(Progress(str(number), 0, request.goal))
            tokens += request.goal
            if tokens > free or tokens >= self.limits.step_tokens:
                break
        return waiting

    def _step(self, plan: Iteration) -> None:
        """Run one iteration that has prompts, with or without the decode batch."""
        batch = len(self._decoding) if plan.decode else 0
        self._spend(self.cost.step_s(plan.spans, batch, self._context) + self.join_s, 1)
        if batch:
            self._decoded(1)
        for span in plan.spans:
            self._prefilled(span)

    def _prefilled(self, span: Span) -> None:
        if span.key == "started":
            request = self._started
            assert request is not None
        else:
            request = self._waiting.popleft()
            self._reserved += request.goal
        request.done = span.stop
        self._started = request if request.done < request.goal else None
        if self._started is None:
            self._first(request)

    def _first(self, request: CoupledRequest) -> None:
        """The prefill of this request is done and yields a token."""
        self._reserved -= request.goal
        self._queued -= request.goal
        self._finished += request.goal
        request.made += 1
        request.first_s = min(request.first_s, self.now)
        if request.made == request.output:
            self._end(request)
            return
        self._keys += 1
        key = f"{self._keys:012}"
        request.joined = self._steps
        self._decoding[key] = request
        self._context += request.goal
        heapq.heappush(self._ends, (self._steps + request.output - request.made, key))

    def _decode(self, until: float) -> None:
        """Run decode-only steps until a request ends, the KV is full, or the next step would begin too late."""
        batch = len(self._decoding)
        if not batch:
            raise ValueError("nothing can run: the oldest prompt does not fit into the KV memory")
        while self._ends[0][1] not in self._decoding:  # it was preempted
            heapq.heappop(self._ends)
        most = min(self._ends[0][0] - self._steps, self._free // batch, MOST_STEPS)
        if until < inf:
            run_s = self.cost.decode_run_s
            most = bisect_left(range(1, most), until - self.now, key=lambda n: run_s(batch, self._context, n)) + 1
        self._spend(self.cost.decode_run_s(batch, self._context, most), most)
        self._decoded(most)

    def _decoded(self, steps: int) -> None:
        self._context += steps * len(self._decoding)
        self._steps += steps
        while self._ends and self._ends[0][0] <= self._steps:
            _, key = heapq.heappop(self._ends)
            request = self._decoding.pop(key, None)
            if request is not None:
                self._context -= self._tokens(request)
                request.made = request.output
                self._end(request)

    def _end(self, request: CoupledRequest) -> None:
        request.end_s = self.now
        self._promised -= request.prompt + request.output

    def _spend(self, seconds: float, passes: int) -> None:
        self.passes += passes
        self._finished = 0
        start, self.now = self.now, self.now + seconds
        if self.busy and self.busy[-1][1] == start:
            start = self.busy.pop()[0]
        self.busy.append((start, self.now))


@dataclass(slots=True)
class Receiver(Replica):
    """A replica whose prompts come with their KV. `again_s(tokens)`: seconds to compute it again after a preemption."""

    again_s: Callable[[int], float] = float

    def _first(self, request: CoupledRequest) -> None:
        if request.preempted:
            self._spend(self.again_s(request.goal), 1)
        Replica._first(self, request)


@dataclass(frozen=True, slots=True)
class CoupledOutcome:
    """The result of `run`: the requests in order of arrival; for each replica its busy intervals and its number of
    forward passes."""

    served: tuple[CoupledRequest, ...]
    busy: tuple[tuple[tuple[float, float], ...], ...]
    passes: tuple[int, ...]


Routing = Callable[[Sequence[Replica], Arrival], int]


def fewest_open(engines: Sequence[Replica], request: Arrival) -> int:
    """The replica with the fewest open requests, on a tie the first."""
    for engine in engines:
        engine.advance(request.at_s)
    return min(range(len(engines)), key=lambda i: engines[i].open)


def round_robin() -> Routing:
    """Each replica in turn."""
    turn = -1

    def route(engines: Sequence[Replica], _: Arrival) -> int:
        nonlocal turn
        turn = (turn + 1) % len(engines)
        return turn

    return route


def run(
    rule: str,
    limits: CoupledLimits,
    cost: Cost,
    requests: Iterable[Arrival],
    replicas: int = 1,
    join_s: float = 0.0,
    route: Routing = fewest_open,
    make: Callable[[str, CoupledLimits, Cost, float], Replica] = Replica,
) -> CoupledOutcome:
    """Serve `requests`, which are sorted by arrival. `route` chooses the replica of each, and advances those that it
    looks at to the arrival. `make` makes a replica. `join_s`: extra seconds of an iteration with prompts. Raises
    ValueError for a request that can never run or arrives out of order."""
    engines = [make(rule, limits, cost, join_s) for _ in range(replicas)]
    served: list[CoupledRequest] = []
    for arrival in requests:
        _check(arrival, limits, served)
        place = route(engines, arrival)
        engines[place].advance(arrival.at_s)
        request = CoupledRequest(arrival.at_s, arrival.prompt, arrival.output, place)
        served.append(request)
        engines[place].add(request)
    for engine in engines:
        engine.advance(inf)
    return CoupledOutcome(
        tuple(served), tuple(tuple(engine.busy) for engine in engines), tuple(engine.passes for engine in engines)
    )


def _check(arrival: Arrival, limits: CoupledLimits, served: Sequence[CoupledRequest]) -> None:
    where = f"request {len(served) + 1}"
    if arrival.prompt < 1 or arrival.output < 1 or arrival.prompt + arrival.output > limits.kv_tokens:
        raise ValueError(
            f"{where}: {arrival.prompt} + {arrival.output} tokens; each must be at least 1, their sum at most"
            f" {limits.kv_tokens}, the KV tokens of one instance"
        )
    if arrival.at_s < (served[-1].arrival_s if served else 0.0):
        raise ValueError(f"{where} arrives at {arrival.at_s:g} s, before its predecessor")
