"""A simulated worker process: the live core, a simulated engine and KV store, and statistics of its use."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from random import Random
from typing import Any, Protocol

from tetri.core.actions import Action, LengthKnown, Predict, Publish
from tetri.core.instance.identity import Identity
from tetri.core.worker.worker import Worker
from tetri.engine.plan import StepPlan
from tetri.engine_request import StepDone
from tetri.executor import KV, RequestEngine, WorkerExecutor
from tetri.policy.rules import LENGTHS
from tetri.request import Sampling
from tetri.sim.kernel import Kernel
from tetri.sim.links import Port, SimulatedKV
from tetri.sim.nodes import Node
from tetri.sim.scripted import Scripted, TextOf
from tetri.sim.setup import SimError
from tetri.wire.messages import ClusterView, LoadReport


@dataclass(slots=True)
class Use:
    """How an instance's engine spent its time, in seconds. `spans`: (start, stop, kind); the kind is prefill, decode
    or mixed (both in one step), adjacent ones joined; None unless requested. `roles`: (since, role)."""

    busy_s: dict[str, float] = field(default_factory=dict)
    first_s: float | None = None  # start of the first step
    last_s: float | None = None  # end of the last step
    steps: int = 0  # forward passes
    prefill_tokens: int = 0
    decode_tokens: int = 0
    preempted: int = 0
    roles: list[tuple[float, str]] = field(default_factory=list)
    spans: list[tuple[float, float, str]] | None = None

    def add(self, start: float, stop: float, what: str) -> None:
        """Add one busy interval of this kind."""
        self.busy_s[what] = self.busy_s.get(what, 0.0) + stop - start
        self.first_s = start if self.first_s is None else self.first_s
        self.last_s = stop
        if self.spans is not None:
            last = self.spans[-1] if self.spans else None
            if last is not None and last[1] == start and last[2] == what:
                self.spans[-1] = (last[0], stop, what)
            else:
                self.spans.append((start, stop, what))


FORETELLS = ("hidden", "both")  # kinds of predictors that use hidden states


def no_text(sampling: Sampling) -> None:
    """No request has a recorded text: each writes `max_tokens` tokens."""


class SimulatedPredictor:
    """The length predictor of one instance. It handles one prompt at a time, in parallel with the main model, whose
    steps take `predictor_slowdown` times as long meanwhile (paper, Figure 17). `text_of` as in `Scripted`."""

    def __init__(
        self, kernel: Kernel, own: Identity, seed: int, receive: Callable[[Any], None], text_of: TextOf = no_text
    ) -> None:
        self.kernel, self.own, self.seed, self.receive, self.text_of = kernel, own, seed, receive, text_of
        self.rng = Random(0)
        self.busy_until = -inf

    def predict(self, wanted: Predict) -> LengthKnown | None:
        """Predict a length, or return None if the prediction arrives later. It depends only on the seed and the
        request, not on the policies. Raises SimError as `_trained`."""
        known = self._trained(wanted) if self.own.rules.length == "trained" else self._pretended(wanted)
        seconds = self.own.cost.predict_s(len(wanted.prompt))
        if seconds == 0.0:
            return known
        self.busy_until = max(self.busy_until, self.kernel.now) + seconds
        self.kernel.at(self.busy_until, self.receive, known)
        return None

    def _trained(self, wanted: Predict) -> LengthKnown:
        """Return the recorded prediction of the classifier. Raises SimError if the text has none."""
        text = self.text_of(wanted.sampling)
        if text is not None and text.classifier is None:
            raise SimError(f"no classifier prediction is recorded for a text of {text.prompt} + {text.output} tokens")
        return LengthKnown(wanted.key, None, None if text is None else text.classifier)

    def _pretended(self, wanted: Predict) -> LengthKnown:
        """Predict with a length policy that knows the true length, such as oracle or noisy."""
        rules, sampling, text = self.own.rules, wanted.sampling, self.text_of(wanted.sampling)
        if text is not None:
            sampling = Sampling(max_tokens=text.output, ignore_eos=True)
        self.rng.seed(f"{self.seed} {wanted.key}")
        return LengthKnown(wanted.key, LENGTHS[rules.length](len(wanted.prompt), sampling, rules, self.rng))

    def stretched(self, start: float, seconds: float) -> float:
        """Return how long a step from `start` on takes that takes `seconds` without the predictor."""
        slowdown, beside = self.own.cost.predictor_slowdown, self.busy_until - start
        if beside <= 0.0 or slowdown == 1.0:
            return seconds
        return min(seconds * slowdown, seconds + beside * (1.0 - 1.0 / slowdown))


class SimEngine(RequestEngine, Protocol):
    """An engine whose steps take virtual time: the simulator plans a step, waits, then runs it."""

    def plan(self, most: int = 1, chunk: int | None = None) -> StepPlan:
        """Plan at most `most` passes, the only one with a chunk of at most `chunk` tokens."""
        ...

    def run(self, plan: StepPlan, steps: int) -> StepDone:
        """Carry out the first `steps` passes of the plan."""
        ...


class Moved(KV, Protocol):
    """A KV store that counts the bytes it received."""

    @property
    def moved_bytes(self) -> int:
        """Bytes received from other instances."""


class WorkerNode(Node):
    """A worker's process. While the engine computes, events wait in the inbox. An event other than a cluster view ends
    a run of several passes after the current pass."""

    core: Worker

    idle_s = 0.0  # seconds of a pass that computes nothing
    engine: SimEngine
    memory: Moved
    predictor: SimulatedPredictor
    executor: WorkerExecutor

    def __init__(self, kernel: Kernel, core: Worker, port: Port) -> None:
        super().__init__(kernel, core.own.iid, core)
        self.port = port
        self.use = Use(roles=[(max(kernel.now, 0.0), core.own.instance.role)])
        self._plan: StepPlan | None = None
        self._started = 0.0
        self._ends = (0.0, 0)  # the end of the run in seconds, and its number of passes
        self._cut = False  # the run ends with the current pass already

    def equip(self, engine: SimEngine, memory: Moved, predictor: SimulatedPredictor) -> None:
        """Set the engine, the KV store and the predictor. Call it before `start`."""
        self.engine, self.memory, self.predictor = engine, memory, predictor
        self.executor = WorkerExecutor(
            self.core, lambda: self.now, engine, memory, self.port, self.step, predictor.predict
        )
        self.executor.table[Publish] = self.publish

    def carry_out(self, actions: Sequence[Action]) -> None:
        """Carry out the core's actions."""
        self.executor.carry_out(actions)

    @abstractmethod
    def leftovers(self) -> list[int]:
        """Return counts of the blocks, slots and other resources that are still held; all zeros when there are none."""

    # ------------------------------------------------------------ the loop

    def receive(self, event: Any) -> None:
        if self._plan is None:
            super().receive(event)
            return
        self.inbox.append(event)
        if not self._cut and not isinstance(event, ClusterView):  # a view can wait (net/hub.py)
            self._cut_short(self._plan)

    def _turn(self, _: Any) -> None:
        self._turn_set = False
        if self._plan is None:
            self.turn()

    def awake(self) -> bool:
        return self._plan is None

    def publish(self, action: Publish) -> None:
        """Publish a message, and record the role of a load report."""
        report = action.message
        if isinstance(report, LoadReport) and report.role != self.use.roles[-1][1]:
            self.use.roles.append((self.kernel.now, report.role))
        self.port.publish(report)

    # ------------------------------------------------------------ the engine

    def step(self, most: int, chunk: int | None) -> StepDone | None:
        """Start a run of at most `most` passes. Returns its result if it takes no time, else None."""
        plan = self.engine.plan(most, chunk)
        seconds = plan.seconds(plan.steps) or self.idle_s
        if seconds == 0.0:
            return self._finish(plan, plan.steps)
        self._plan, self._started, self._cut = plan, self.kernel.now, plan.steps == 1
        self._end_at(plan.steps, seconds)
        return None

    def _end_at(self, steps: int, seconds: float) -> None:
        self._ends = self._started + self.predictor.stretched(self._started, seconds), steps
        self.kernel.at(max(self._ends[0], self.kernel.now), self._end, self._ends)

    def _cut_short(self, plan: StepPlan) -> None:
        """End the run after the current pass."""
        self._cut = True
        low, high, passed = 1, self._ends[1], self.kernel.now - self._started
        while low < high:
            middle = (low + high) // 2
            if self.predictor.stretched(self._started, plan.seconds(middle)) >= passed:
                high = middle
            else:
                low = middle + 1
        if low < self._ends[1]:
            self._end_at(low, plan.seconds(low))

    def _end(self, ends: tuple[float, int]) -> None:
        if ends is not self._ends or self._plan is None:
            return  # the run was cut short
        plan, self._plan = self._plan, None
        what = "decode" if not plan.chunk else "mixed" if plan.batch else "prefill"
        if plan.chunk or plan.batch:
            self.use.add(self._started, self.kernel.now, what)
        done = self._finish(plan, ends[1])
        if self.inbox:
            self._receive_lengths()
        self.carry_out(self.core.handle(done, self.now))
        self.turn()

    def _receive_lengths(self) -> None:
        """Handle predictions that arrived during the step before its StepDone, as the live worker does."""
        inbox = self.inbox
        known = [event for event in inbox if isinstance(event, LengthKnown)]
        if known:
            self.inbox = [event for event in inbox if not isinstance(event, LengthKnown)]
            for event in known:
                self.carry_out(self.core.handle(event, self.now))

    def _finish(self, plan: StepPlan, steps: int) -> StepDone:
        batch = len(plan.batch)
        done = self.engine.run(plan, steps)
        use, steps = self.use, done.steps
        if batch:
            use.steps += steps
            use.decode_tokens += batch * steps
        elif plan.chunk:
            use.steps += steps
        if plan.chunk:
            use.prefill_tokens += sum([span.stop - span.start for span in plan.chunk])
        use.preempted += len(done.preempted)
        return done


class PlainWorker(WorkerNode):
    """A worker that moves no real bytes. Its link carries `bytes_s` bytes per second. `text_of` as in `Scripted`."""

    engine: Scripted
    memory: SimulatedKV

    def __init__(
        self, kernel: Kernel, core: Worker, port: Port, bytes_s: float, seed: int, text_of: TextOf = no_text
    ) -> None:
        super().__init__(kernel, core, port)
        own = core.own
        estimates_lengths = own.expected is not None and own.expected.kind in FORETELLS
        self.equip(
            Scripted(own.capacity, own.cost, text_of, estimates_lengths=estimates_lengths),
            SimulatedKV(kernel, self, own.instance.fingerprint.block_bytes, bytes_s),
            SimulatedPredictor(kernel, own, seed, self.receive, text_of),
        )

    def leftovers(self) -> list[int]:
        """Return counts of the resources that are still held. Checks the engine's invariants."""
        core, engine, blocks = self.core, self.engine, self.core.own.capacity.blocks
        engine.check()
        left = [len(core.ledger), blocks - core.ledger.free, blocks - engine.free, len(engine.slots)]
        return [*left, self.memory.kept, core.prefill.slots_used]
