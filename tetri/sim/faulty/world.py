"""Simulate a deployment with injected faults and check its guarantees:

    result = FaultyWorld(Setup(cost, prefill=2, decode=2), arrivals, parse_faults("drop=0.01,kill=0.001")).run()

* Every request gets exactly its own tokens and text, in order, unless its client cancels it or its deadline passes.
* Every request ends, and at the end every KV block, slot, table row and offer is free.
* The invariants of each core hold after each event.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from random import Random
from typing import Any

from tetri.core.actions import BROKER
from tetri.core.worker.worker import Worker
from tetri.engine.emulated import EmulatedEngine
from tetri.faults import Cut
from tetri.kv.limit import LimitedLink
from tetri.request import ROLES, Stage
from tetri.sim.faulty.chance import Chance, Faults
from tetri.sim.faulty.clients import ADMIN, CLIENT_S, Admin, CheckedClients, on_the_wire
from tetri.sim.faulty.kv import Memories, store
from tetri.sim.faulty.network import FaultyPort, FaultyWiring, Process
from tetri.sim.faulty.processes import (
    TOKEN_BYTES,
    VOCABULARY,
    FaultyBroker,
    FaultyMonitor,
    FaultyPredictor,
    FaultyWorker,
    WatchedCore,
)
from tetri.sim.report import SimResult
from tetri.sim.setup import PromiseBroken, Setup, SimError, Timeouts
from tetri.sim.traces import Arrival, TraceError
from tetri.sim.world import MONITOR, World
from tetri.wire.clients import BrokerReply
from tetri.wire.codec import decode, encode

FORGOTTEN_S = 60.0  # how long after its end a request is removed from all tables


def lively(setup: Setup) -> Setup:
    """Return the setup with the heartbeat and message rates of a live deployment, which repair lost messages."""
    return replace(setup, heartbeat_s=0.2, stream_interval=1)


class FaultyWorld(World):
    """One simulation with faults. With a `log`, every event and action is appended to it as one line. `predictor`: the
    class of the workers' length predictors. With `cuts`, requests may end with an error that says why."""

    broker: FaultyBroker
    monitor: FaultyMonitor
    clients: CheckedClients
    wiring: FaultyWiring
    workers: dict[str, FaultyWorker]  # type: ignore[assignment]  # all workers are

    def __init__(
        self,
        setup: Setup,
        requests: Iterable[Arrival],
        faults: Faults,
        progress: Callable[[int], None] | None = None,
        log: list[str] | None = None,
        predictor: type[FaultyPredictor] = FaultyPredictor,
        cuts: Sequence[Cut] = (),
    ) -> None:
        self.faults, self.log, self.predictor, self.cuts = faults, log, predictor, cuts
        self.admin = Admin(self.send, self._verify_role)
        super().__init__(replace(setup, timelines=True), requests, progress)

    # ------------------------------------------------------------ the parts

    def _wiring(self) -> FaultyWiring:
        setup = self.setup
        self.chance = Chance(self.kernel, self.faults, setup.seed, self.log, self.cuts)
        block_bytes = setup.block_tokens * setup.cost.kv_token_bytes
        self.memories = Memories(self.chance, block_bytes, setup.link_latency_s)
        return FaultyWiring(self.chance, setup.link_latency_s, setup.transfer == "request")

    def _clients(self, requests: Iterator[Arrival]) -> CheckedClients:
        broker, ask_s = self.broker.receive, self.setup.timeouts.ask_s
        return CheckedClients(
            self.kernel, requests, broker, self.progress, chance=self.chance, ask_s=ask_s, send=self.send
        )

    def _timeouts(self) -> Timeouts:
        return self.setup.timeouts

    def _broker(self) -> FaultyBroker:
        core, port = self._broker_core(VOCABULARY), FaultyPort(self.wiring, BROKER)
        port.process = node = FaultyBroker(self.chance, core, port, self._deliver)
        self.wiring.processes[BROKER] = node
        return node

    def _monitor(self) -> FaultyMonitor:
        node = self._monitor_process()
        self.wiring.processes[MONITOR] = node
        self.wiring.subscribers[MONITOR] = [self.broker]
        return node

    def _monitor_process(self) -> FaultyMonitor:
        core, port = WatchedCore(self._monitor_core(), MONITOR, self.chance), FaultyPort(self.wiring, MONITOR)
        port.process = node = FaultyMonitor(self.kernel, core, port)  # type: ignore[arg-type]  # a WatchedCore
        return node

    def _worker(self, iid: str, role: str) -> FaultyWorker:
        setup, capacity, chance = self.setup, self.setup.capacity(), self.chance
        engine = EmulatedEngine(
            capacity=capacity, token_bytes=TOKEN_BYTES, vocabulary=VOCABULARY, cost=setup.cost, clock=lambda: 0.0
        )
        paths, slots = chance.rng.choice(setup.kv_paths), setup.slots or capacity.blocks
        link, slot_bytes = LimitedLink(setup.link_bytes_s), engine.fingerprint.block_bytes
        kv, slow = store(self.memories, iid, paths, slots, slot_bytes, link)
        self.wiring.segments[kv.reach.segment] = None
        own = self._identity(iid, role, engine.fingerprint, kv.reach)
        port = FaultyPort(self.wiring, iid)
        core = Worker(own, Random(own.incarnation), self.kernel.now)
        port.process = node = FaultyWorker(chance, core, port, engine, kv, slow)
        node.equip(engine, node.copies, self.predictor(chance, own, setup.seed, node))
        return node

    # ------------------------------------------------------------ the run

    def run(self) -> SimResult:
        """Run until every request has ended and all resources are free. Raises PromiseBroken, one line with the seed
        and the time, if a guarantee is violated; SimError or TraceError if the requests are invalid."""
        try:
            result = super().run()
        except Exception as error:
            if isinstance(error, SimError | TraceError) and not isinstance(error, PromiseBroken):
                raise
            text = " ".join(str(error).split()) or type(error).__name__
            raise PromiseBroken(f"seed {self.setup.seed}, {self.kernel.now:.4f} s: {text}") from error
        result.faults = dict(self.chance.counts)
        return result

    def send(self, event: Any) -> None:
        """Send a client's event to the broker."""
        self.chance.after(2 * CLIENT_S, self.broker.receive, on_the_wire(event))

    def _deliver(self, name: bytes, message: Any) -> str:
        """Deliver a message of the broker. Returns "sent", "full" (the client's queue) or "gone" (the client)."""
        message = decode(encode(message), BrokerReply)
        return self.admin.receive(message) if name == ADMIN else self.clients.deliver(name, message)

    def _verify_role(self, iid: str, role: str) -> None:
        """Assert that an instance has this role, unless it was killed and the broker does not know that yet."""
        worker, known = self.workers[iid], self.broker.core.members.by_iid[iid]
        if worker.alive and worker.core.own.incarnation == known.instance.incarnation:
            assert worker.core.role == role, f"{iid} is {worker.core.role}, not {role}"

    def _start(self) -> None:
        super()._start()
        chance, faults = self.chance, self.faults
        workers = len(self.workers)
        chance.often("kill", workers, self._kill)
        chance.often("kill_monitor", 1, self._kill_monitor)
        chance.often("freeze", workers + 2, self._freeze)
        chance.often("disconnect", (workers + 1) ** 2 / 2, self._disconnect)
        chance.often("flip", bool(faults.flip), self._flip)
        chance.often("migrate", bool(faults.migrate), self._migrate)

    def _any_worker(self) -> FaultyWorker:
        return self.chance.rng.choice([*self.workers.values()])

    def _kill(self) -> bool:
        worker = self._any_worker()
        if worker.alive:
            worker.kill(self.chance)
            self.chance.recovers(self._restart, worker)
            return True
        return False

    def _restart(self, dead: FaultyWorker) -> None:
        worker = self._worker(dead.name, dead.core.own.instance.role)
        worker.use = dead.use  # statistics of all incarnations
        worker.memory.slow.moved_bytes = dead.memory.slow.moved_bytes
        self.workers[dead.name] = worker
        self._revive(worker)

    def _kill_monitor(self) -> bool:
        if self.monitor.alive:
            self.monitor.kill(self.chance)
            self.chance.recovers(self._restart_monitor)
            return True
        return False

    def _restart_monitor(self, _: Any) -> None:
        self.monitor = self._monitor_process()
        self._revive(self.monitor)

    def _revive(self, process: Process) -> None:
        self.wiring.replace(process)
        process.port.connect(BROKER, BROKER)
        process.start()

    def _freeze(self) -> bool:
        process: Process = self.chance.rng.choice([*self.wiring.processes.values()])
        if process.alive and not process.frozen:
            process.freeze(self.chance)
            return True
        return False

    def _disconnect(self) -> bool:
        lines = [line for line in self.wiring.connections() if line.up]
        if lines:
            line = self.chance.rng.choice(lines)
            self.chance.note(line.src.name, f"loses its connection to {line.name}")
            line.break_off()
        return bool(lines)

    def _flip(self) -> bool:
        self.admin.flip(self._any_worker().name, self.chance.rng.choice(ROLES))
        return True

    def _migrate(self) -> bool:
        broker, rng = self.broker, self.chance.rng
        running = [choice for choice in broker.core.table.active() if choice.stage is Stage.DECODE]
        if not running or broker.frozen:
            return False
        actions = broker.core.lifecycle.migrations.start(rng.choice(running), self._any_worker().name)
        self.chance.note(broker.name, "an operator migrates a choice", actions)
        broker.carry_out(actions)
        return bool(actions)

    # ------------------------------------------------------------ the promises

    def _look(self, _: Any) -> None:
        if self.kernel.now > self.chance.until + self.setup.limit_s:
            raise PromiseBroken(f"not over after {self.setup.limit_s:g} s: {self._unfinished()}")
        super()._look(_)

    def _unfinished(self) -> list[str]:
        processes = self.wiring.processes.values()
        return [
            *super()._unfinished(),
            *(f"{choice.id} is {choice.stage}" for choice in self.broker.core.table.active()),
            *(f"{process.name} is dead" for process in processes if not process.alive),
            *(f"{process.name} is frozen" for process in processes if process.frozen),
            *(["faults go on"] if not self.chance.over else []),
        ]

    def check(self) -> None:
        """Check the guarantees at the end. Raises AssertionError or PromiseBroken."""
        for client in self.clients.clients:
            client.verify()
        core = self.broker.core
        core.tick(self.kernel.now + FORGOTTEN_S)
        table = core.table
        kept = self.broker.stoppers or table.requests or table.choices or table.keys
        assert not kept, "ended requests are left over"
        for node in (self.broker, self.monitor, *self.workers.values()):
            node.core.check()
        for iid, worker in self.workers.items():
            left = worker.leftovers()
            if any(left):
                raise PromiseBroken(f"{iid} still holds resources: {left}")
