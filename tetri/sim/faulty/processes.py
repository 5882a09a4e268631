"""The broker, monitor and workers of a simulated deployment with faults: real KV bytes, real text, and cores that are
checked after each event."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, cast

from tetri.core.actions import Action, Detokenize, Detokenized, Release, Reply, Undelivered
from tetri.core.broker.broker import Broker
from tetri.core.instance.identity import Identity
from tetri.core.monitor import Monitor
from tetri.core.worker.worker import Worker
from tetri.engine.emulated import EmulatedEngine
from tetri.engine.plan import StepPlan
from tetri.engine_request import StepDone
from tetri.kv.store import Store
from tetri.sim.faulty.chance import Chance
from tetri.sim.faulty.kv import FaultyCopies, SlowReader
from tetri.sim.faulty.network import FaultyPort, Process
from tetri.sim.instance import SimulatedPredictor, WorkerNode
from tetri.sim.nodes import AnyCore, BrokerNode, MonitorNode
from tetri.text import ByteTokenizer, Stopper
from tetri.wire.messages import WorkerEvent

EDGE = ByteTokenizer()
VOCABULARY, TOKEN_BYTES = 64, 8  # parameters of the emulated engine


class WatchedCore:
    """Wraps a core: logs its events and actions and checks its invariants after each event."""

    def __init__(self, core: AnyCore, name: str, chance: Chance) -> None:
        self.core, self.name, self.chance = core, name, chance
        self.deadline, self.check = core.deadline, core.check

    def __getattr__(self, name: str) -> Any:
        return getattr(self.core, name)

    def handle(self, event: Any, now: float) -> Sequence[Action]:
        return self._watched(self.core.handle(event, now), event)

    def tick(self, now: float) -> Sequence[Action]:
        actions = self.core.tick(now)
        return self._watched(actions, "tick") if actions else actions

    def _watched(self, actions: Sequence[Action], why: Any) -> Sequence[Action]:
        self.chance.note(self.name, why, actions)
        self.check()
        return actions


class FaultyMonitor(Process, MonitorNode):
    """The monitor's process."""

    core: Monitor
    port: FaultyPort


class FaultyBroker(Process, BrokerNode):
    """The broker's process. `deliver(client, message)` returns "sent", "full" (the client's queue) or "gone"."""

    reads = WorkerEvent
    port: FaultyPort

    def __init__(self, chance: Chance, core: Broker, port: FaultyPort, deliver: Callable[[bytes, Any], str]) -> None:
        watched = cast(Broker, WatchedCore(core, port.name, chance))
        super().__init__(chance.kernel, watched, port, deliver)
        self.deliver = deliver
        self.stoppers: dict[str, Stopper] = {}
        self._refused: dict[bytes, None] = {}  # clients that could not take a reply in this turn
        self._table |= {Reply: self._reply, Detokenize: self._detokenize, Release: lambda do: self._forget(do.rid)}

    def turn(self) -> None:
        """Run one turn of the loop, unless the process is dead or frozen."""
        self._refused.clear()
        super().turn()

    def _reply(self, action: Reply) -> Undelivered | None:
        outcome = "full" if action.client in self._refused else self.deliver(action.client, action.message)
        if outcome == "sent":
            return None
        self._refused[action.client] = None
        return Undelivered(action.client, action.message, outcome == "gone")

    def _detokenize(self, action: Detokenize) -> Detokenized:
        stopper = self.stoppers.get(action.rid)
        if stopper is None:
            asked, silent = action.sampling, action.sampling.stop_token_ids
            stopper = Stopper(EDGE, asked.stop, min_tokens=asked.min_tokens, silent=silent)
            self.stoppers[action.rid] = stopper
        text, counted = stopper.advance(action.ids, action.final)
        return Detokenized(action.rid, action.start, action.ids, text, counted, action.final)

    def _forget(self, rid: str) -> None:
        del self.stoppers[rid]


class FaultyPredictor(SimulatedPredictor):
    """A length predictor whose predictions sometimes never arrive."""

    def __init__(self, chance: Chance, own: Identity, seed: int, worker: FaultyWorker) -> None:
        super().__init__(chance.kernel, own, seed, worker.receive)
        self.chance, self.worker = chance, worker

    def predict(self, wanted: Any) -> Any:
        """Predict a length, unless a fault suppresses the prediction."""
        return None if self.chance.happens("mute") else super().predict(wanted)

    def estimates(self, done: StepDone) -> StepDone:
        """Return the step with hidden-state estimates; here there are none."""
        return done


class FaultyWorker(Process, WorkerNode):
    """A worker with the emulated engine and a KV store."""

    idle_s = 0.001  # seconds of a pass that computes nothing, while the engine only waits for messages
    port: FaultyPort
    memory: FaultyCopies
    engine: EmulatedEngine
    predictor: FaultyPredictor

    def __init__(
        self, chance: Chance, core: Worker, port: FaultyPort, engine: EmulatedEngine, own: Store, slow: SlowReader
    ) -> None:
        super().__init__(chance.kernel, cast(Worker, WatchedCore(core, port.name, chance)), port)
        self.store, slow.owner = own, self
        self.copies = FaultyCopies(chance, engine, own, slow)
        self._late: tuple[float, int] | None = None  # a run that ended while the process was frozen

    def turn(self) -> None:
        """Handle the inbox and finished KV copies, then run one turn of the loop."""
        if self.alive and not self.frozen:
            inbox, self.inbox = self.inbox, []
            for event in chain(inbox, self.copies.events()):
                self.carry_out(self.core.handle(event, self.now))
            super().turn()

    def wake(self) -> None:
        """Schedule a turn: KV has arrived, or slots are free."""
        if self._plan is not None and not self._cut:
            self._cut_short(self._plan)
        elif self._plan is None:
            super().wake()

    def kill(self, chance: Chance) -> None:
        """Kill the process and close its KV store."""
        super().kill(chance)
        self.store.close()
        self._plan = None

    def _end(self, ends: tuple[float, int]) -> None:
        if not self.frozen:
            super()._end(ends)
        elif ends is self._ends:  # else the run was cut short
            self._late = ends

    def go_on(self, _: Any = None) -> None:
        """Let the process go on; a step that was due ends now."""
        late, self._late = self._late, None
        super().go_on()
        if late is not None:
            self._end(late)

    def _finish(self, plan: StepPlan, steps: int) -> StepDone:
        return self.predictor.estimates(super()._finish(plan, steps))

    def leftovers(self) -> list[int]:
        """Return counts of the blocks, slots, offers and other resources that are still held."""
        core, engine, capacity = self.core, self.engine, self.core.own.capacity
        left = [len(core.ledger), capacity.blocks - core.ledger.free, capacity.blocks - len(set(engine.free))]
        left += [len(engine.contents), core.prefill.slots_used, self.store.slots - self.store.free_slots]
        return [*left, len(core.dispatcher.offers)]
