"""Simulate a deployment: the live cores in virtual time, connected by simulated links.

    result = World(Setup(cost, prefill=2, decode=2), arrivals).run()

All decisions are made by the cores: placing, ordering, packing, dispatching and admitting requests. Every request has
a given prompt length and output length: either it asks for exactly that many tokens (`max_tokens` with `ignore_eos`),
or it has a recorded text. The same setup and requests give exactly the same result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from random import Random
from typing import Any

from tetri.core.actions import BROKER
from tetri.core.broker.broker import Broker
from tetri.core.broker.delivery import MAX_ATTEMPTS, Limits
from tetri.core.instance.identity import Identity
from tetri.core.monitor import Monitor
from tetri.core.worker.worker import Worker
from tetri.instance import Fingerprint, Instance, Reach
from tetri.request import ROLES
from tetri.sim.clients import Clients, Outcome
from tetri.sim.instance import PlainWorker, WorkerNode
from tetri.sim.kernel import Kernel, uncollected
from tetri.sim.links import Port, Wiring
from tetri.sim.nodes import BrokerNode, MonitorNode
from tetri.sim.report import SimResult
from tetri.sim.setup import UNBOUNDED, PromiseBroken, Setup, Timeouts
from tetri.sim.traces import Arrival

MONITOR = "monitor"
SETTLE_S = 60.0  # how long after the last answer all resources must be free
LOOK_S = 0.1
TIMELINES_MIB = 64  # as live


class World:
    """One simulation. `progress` is called with the number of answered requests."""

    def __init__(
        self, setup: Setup, requests: Iterable[Arrival], progress: Callable[[int], None] | None = None
    ) -> None:
        setup.check()
        self.setup = setup
        self.kernel = Kernel(-setup.warm_s)
        self.rng = Random(f"world {setup.seed}")
        self.progress = progress
        self.wiring = self._wiring()
        self.broker = self._broker()
        self.clients = self._clients(iter(requests))
        self.monitor = self._monitor()
        self.workers: dict[str, WorkerNode] = {}
        for role in ROLES:
            for number in range(getattr(setup, role)):
                self._add_worker(f"{role[0]}{number}", role)
        self._steps = 0
        self.stopped = False

    # ------------------------------------------------------------ the parts

    def _wiring(self) -> Wiring:
        return Wiring(self.kernel, self.setup.link_latency_s, self.setup.transfer == "request")

    def _clients(self, requests: Iterator[Arrival]) -> Clients:
        return Clients(self.kernel, requests, self.broker.receive, self.progress)

    def _timeouts(self) -> Timeouts:
        """No timeout ever fires: no process dies and no message is lost. The broker checks for a new membership once
        per heartbeat."""
        return _endless_timeouts(self.setup.heartbeat_s)

    def _broker(self) -> BrokerNode:
        core = self._broker_core(vocabulary=2)
        port = Port(self.wiring, BROKER)
        node = BrokerNode(self.kernel, core, port, lambda who, what: self.clients.receive_reply(who, what))
        self.wiring.processes[BROKER] = node
        return node

    def _broker_core(self, vocabulary: int) -> Broker:
        setup, capacity, timeouts = self.setup, self.setup.capacity(), self._timeouts()
        limits = Limits(
            context=capacity.context,
            vocabulary=vocabulary,
            max_open=UNBOUNDED,
            max_mib=UNBOUNDED,
            max_attempts=timeouts.max_attempts,
            max_deaths=timeouts.max_deaths,
            heartbeat_s=setup.heartbeat_s,
            dead_s=timeouts.dead_s,
            patience_s=timeouts.patience_s,
            client_grace_s=timeouts.client_grace_s,
            timelines_mib=TIMELINES_MIB if setup.timelines else 0,
            quiet_s=timeouts.quiet_s,
        )
        epoch = self.rng.getrandbits(62)
        of = ("", setup.cost, capacity.chunk_tokens, setup.slo)
        return Broker(limits, setup.rules, epoch, Random(epoch), self.kernel.now, *of)

    def _monitor(self) -> MonitorNode:
        node = MonitorNode(self.kernel, self._monitor_core(), Port(self.wiring, MONITOR))
        self.wiring.processes[MONITOR] = node
        self.wiring.subscribers[MONITOR] = [self.broker]
        return node

    def _monitor_core(self) -> Monitor:
        setup, gone_s = self.setup, self._timeouts().gone_s
        epoch, now = self.rng.getrandbits(62), self.kernel.now
        return Monitor(setup.flip, setup.flip_settings, epoch, setup.load_s, now, setup.stale_s, gone_s)

    def _add_worker(self, iid: str, role: str) -> None:
        node = self._worker(iid, role)
        if self.setup.spans:
            node.use.spans = []
        self.workers[iid] = node
        self.wiring.processes[iid] = node
        self.wiring.subscribers[iid] = [self.monitor]
        self.wiring.subscribers[MONITOR].append(node)

    def _worker(self, iid: str, role: str) -> WorkerNode:
        setup = self.setup
        reach = Reach(paths=["local"], host="", process=0, segment=iid)
        own = self._identity(iid, role, _fingerprint(setup), reach)
        core = Worker(own, Random(own.incarnation), self.kernel.now)
        port, text_of = Port(self.wiring, iid), self.clients.text_of
        return PlainWorker(self.kernel, core, port, setup.link_bytes_s, setup.seed, text_of)

    def _identity(self, iid: str, role: str, fingerprint: Fingerprint, reach: Reach) -> Identity:
        setup, capacity, timeouts = self.setup, self.setup.capacity(), self._timeouts()
        instance = Instance(
            iid=iid,
            incarnation=self.rng.getrandbits(62),
            role=role,
            inbox=iid,
            fingerprint=fingerprint,
            capacity=capacity,
            reach=reach,
        )
        return Identity(
            instance,
            slots=setup.slots or capacity.blocks,
            rules=setup.rules,
            reserve_share=setup.reserve_share,
            heartbeat_s=setup.heartbeat_s,
            view_s=timeouts.view_s,
            offer_s=timeouts.offer_s,
            patience_s=timeouts.patience_s,
            cost=setup.cost,
            load_s=setup.load_s,
            stream_interval=setup.stream_interval,
            expected=setup.expected if setup.rules.length == "trained" else None,
            traces=setup.timelines,
        )

    # ------------------------------------------------------------ the run

    def run(self) -> SimResult:
        """Run until every request is answered and all resources are free, or until `stop`. Raises SimError if the
        requests are invalid, PromiseBroken if a guarantee is violated."""
        with uncollected():
            self._start()
            self.kernel.run()
        if self.stopped:
            self._check_cores()
        else:
            self.check()
        return self._result()

    def stop(self) -> None:
        """End the run with requests open, from `progress`. Only the promises of the end of a run are not checked."""
        self.stopped = True
        self.kernel.stop()

    def _start(self) -> None:
        self.broker.start()
        self.monitor.port.connect(BROKER, BROKER)
        self.monitor.start()
        for worker in self.workers.values():
            worker.port.connect(BROKER, BROKER)
            worker.start()
        self.clients.start()
        self.kernel.at(0.0, self._look)
        self.kernel.at(self.setup.stall_s, self._watch)

    def _result(self) -> SimResult:
        return SimResult(
            self.clients.outcomes,
            {iid: worker.use for iid, worker in self.workers.items()},
            self._counters(),
            self.clients.last_s,
        )

    def _look(self, _: Any) -> None:
        """Stop the simulation if everything is done."""
        if self.clients.over:
            if not self._unfinished():
                self.kernel.stop()
                return
            if self.kernel.now > self.clients.last_s + SETTLE_S:
                raise PromiseBroken(f"{SETTLE_S:g} s after the last answer: {self._unfinished()}")
        self.kernel.at(self.kernel.now + LOOK_S, self._look)

    def _watch(self, _: Any) -> None:
        """Raise PromiseBroken if no engine computes although requests are open."""
        steps = sum(worker.use.steps for worker in self.workers.values())
        if steps == self._steps and self.clients.open:
            left = f"{self.clients.open} requests are not served: for {self.setup.stall_s:g} s no engine computed"
            raise PromiseBroken(f"{left} ({', '.join(self._unfinished()) or 'no instance has them'})")
        self._steps = steps
        self.kernel.at(self.kernel.now + self.setup.stall_s, self._watch)

    def _unfinished(self) -> list[str]:
        return [
            f"{iid} has {len(worker.core.prefill.requests)} prefill, {len(worker.core.decode.requests)} decode requests"
            for iid, worker in self.workers.items()
            if worker.core.prefill.requests or worker.core.decode.requests
        ]

    # ------------------------------------------------------------ the promises

    def check(self) -> None:
        """Check the guarantees at the end: all tokens delivered, all blocks free, no open request. Raises
        PromiseBroken."""
        self.broker.core.tick(self.kernel.now + UNBOUNDED)  # removes ended requests from the table
        if self.broker.core.table.requests:
            raise PromiseBroken(f"{len(self.broker.core.table.requests)} requests are left in the broker's table")
        self._check_cores()
        for iid, worker in self.workers.items():
            left = worker.leftovers()
            if any(left):
                raise PromiseBroken(f"{iid} has not given everything back: {left}")
        self._check_tokens()

    def _check_cores(self) -> None:
        for node in (self.broker, self.monitor, *self.workers.values()):
            node.core.check()

    def _check_tokens(self) -> None:
        wanted = self._tokens_of(self.clients.outcomes)
        made = (
            sum(worker.use.prefill_tokens for worker in self.workers.values()),
            sum(worker.use.decode_tokens for worker in self.workers.values()),
        )
        exact = all(o.state == "refused" or (o.state == "done" and o.attempts == 1) for o in self.clients.outcomes)
        if made != wanted if exact else made[0] < wanted[0] or made[1] < wanted[1]:
            raise PromiseBroken(f"the engines computed {made} tokens of prompts and outputs, the requests had {wanted}")

    @staticmethod
    def _tokens_of(outcomes: list[Outcome]) -> tuple[int, int]:
        """Return the prompt tokens, and the output tokens without the first of each choice, which prefill yields."""
        done = [outcome.arrival for outcome in outcomes if outcome.state == "done"]
        return sum(arrival.prompt for arrival in done), sum(arrival.n * (arrival.output - 1) for arrival in done)

    def _counters(self) -> dict[str, int]:
        counts: Counter[str] = Counter(self.broker.core.counters)
        for worker in self.workers.values():
            counts["steps"] += worker.use.steps
            counts["prefill_tokens"] += worker.use.prefill_tokens
            counts["decode_tokens"] += worker.use.decode_tokens
            counts["preempted"] += worker.use.preempted
            counts["moved_bytes"] += worker.memory.moved_bytes
        counts["events"] = self.kernel.happened
        counts["messages"] = self.wiring.sent
        return dict(sorted(counts.items()))


def _endless_timeouts(heartbeat_s: float) -> Timeouts:
    return Timeouts(
        dead_s=UNBOUNDED,
        gone_s=UNBOUNDED,  # as dead_s; else the monitor would flip others while one instance computes a long step
        offer_s=UNBOUNDED,
        view_s=4 * heartbeat_s,
        patience_s=UNBOUNDED,
        quiet_s=UNBOUNDED,  # no client vanishes
        max_attempts=MAX_ATTEMPTS,
    )


def _fingerprint(setup: Setup) -> Fingerprint:
    return Fingerprint(
        engine="simulated",
        version="1",
        isa="any",
        model="simulated",
        weights="none",
        dtype="none",
        kv_dtype="none",
        block_tokens=setup.block_tokens,
        block_bytes=setup.block_tokens * setup.cost.kv_token_bytes,
        layers=1,
        kv_heads=1,
        head_dim=1,
    )
