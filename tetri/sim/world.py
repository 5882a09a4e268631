"""A deployment in virtual time: the very cores that serve live, joined by virtual links.

    result = World(Setup(cost, prefill=2, decode=2), arrivals).run()

Nothing in here decides anything: requests are placed, ordered, packed, dispatched and admitted by the cores. Every
request is a prompt of a given length whose output has a given length: either it asks for just so many tokens
(`max_tokens` with `ignore_eos`), or it has a recorded text that ends by itself. The same setup with the same requests
gives the same result, to the last bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from random import Random
from typing import Any

from tetri.core.actions import BROKER
from tetri.core.broker.broker import Broker
from tetri.core.broker.delivery import Limits
from tetri.core.instance.identity import Identity
from tetri.core.monitor import Monitor
from tetri.core.worker.worker import Worker
from tetri.instance import Instance
from tetri.request import Fingerprint, Reach
from tetri.sim.clients import Clients, Outcome
from tetri.sim.instance import WorkerNode
from tetri.sim.kernel import Kernel
from tetri.sim.links import Port, Wiring
from tetri.sim.nodes import BrokerNode, MonitorNode
from tetri.sim.report import SimResult
from tetri.sim.setup import Setup, SimError
from tetri.sim.traces import Arrival

MONITOR = "monitor"
UNBOUNDED = 1 << 40  # where a live deployment has a limit that is not what is simulated
WARM_S = 1.0  # so long before time 0 the processes start, to know each other when the first request arrives
SETTLE_S = 60.0  # so long after the last answer everybody has let go
LOOK_S = 0.1


class World:
    """One run. `progress` hears how many requests were answered."""

    def __init__(
        self, setup: Setup, requests: Iterable[Arrival], progress: Callable[[int], None] | None = None
    ) -> None:
        setup.check()
        self.setup = setup
        self.kernel = Kernel(-WARM_S)
        self.rng = Random(f"world {setup.seed}")
        self.wiring = Wiring(self.kernel, setup.link_latency_s, setup.transfer == "request")
        self.broker = self._broker()
        self.clients = Clients(self.kernel, iter(requests), self.broker.receive, progress)
        self.monitor = self._monitor()
        self.workers: dict[str, WorkerNode] = {}
        for role in ("prefill", "decode", "mixed"):
            for number in range(getattr(setup, role)):
                self._add_worker(f"{role[0]}{number}", role)
        self._steps = 0

    # ------------------------------------------------------------ the parts

    def _port(self, name: str) -> Port:
        return Port(self.wiring, name)

    def _broker(self) -> BrokerNode:
        setup, capacity = self.setup, self.setup.capacity()
        limits = Limits(
            context=capacity.context,
            vocabulary=2,
            max_open=UNBOUNDED,
            heartbeat_s=setup.heartbeat_s,
            dead_s=UNBOUNDED,  # nobody dies, however long a step takes
            patience_s=UNBOUNDED,
        )
        epoch = self.rng.getrandbits(62)
        core = Broker(
            limits,
            setup.rules,
            epoch,
            Random(epoch),
            self.kernel.now,
            cost=setup.cost,
            chunk_tokens=capacity.chunk_tokens,
        )
        node = BrokerNode(
            self.kernel, core, self._port(BROKER), lambda who, what: self.clients.receive_reply(who, what)
        )
        self.wiring.processes[BROKER] = node
        return node

    def _monitor(self) -> MonitorNode:
        setup = self.setup
        epoch, now = self.rng.getrandbits(62), self.kernel.now
        gone_s = UNBOUNDED  # as dead_s: else a step of seconds had others take the role of who computes it
        core = Monitor(setup.flip, setup.flip_settings, epoch, setup.load_s, now, setup.stale_s, gone_s)
        node = MonitorNode(self.kernel, core, self._port(MONITOR))
        self.wiring.processes[MONITOR] = node
        self.wiring.subscribers[MONITOR] = [self.broker]
        return node

    def _add_worker(self, iid: str, role: str) -> None:
        setup, capacity = self.setup, self.setup.capacity()
        instance = Instance(
            iid=iid,
            incarnation=self.rng.getrandbits(62),
            role=role,
            inbox=iid,
            fingerprint=_fingerprint(setup),
            capacity=capacity,
            reach=Reach(paths=["local"], host="", process=0, segment=iid),
        )
        own = Identity(
            instance,
            slots=setup.slots or capacity.blocks,
            rules=setup.rules,
            reserve_share=setup.reserve_share,
            heartbeat_s=setup.heartbeat_s,
            view_s=4 * setup.heartbeat_s,  # the broker looks once a beat whether a roster is due
            offer_s=UNBOUNDED,  # nothing is lost
            patience_s=UNBOUNDED,
            cost=setup.cost,
            load_s=setup.load_s,
            stream_interval=setup.stream_interval,
            expected=setup.expected if setup.rules.length == "trained" else None,
        )
        core = Worker(own, Random(own.incarnation), self.kernel.now)
        node = WorkerNode(self.kernel, core, self._port(iid), setup.link_bytes_s, setup.seed, self.clients.text_of)
        if setup.spans:
            node.use.spans = []
        self.workers[iid] = node
        self.wiring.processes[iid] = node
        self.wiring.subscribers[iid] = [self.monitor]
        self.wiring.subscribers[MONITOR].append(node)

    # ------------------------------------------------------------ the run

    def run(self) -> SimResult:
        """Until every request is answered and everybody has let go. Raises SimError, or Broken, when a promise is
        broken."""
        self.broker.start()
        self.monitor.port.connect(BROKER, BROKER)
        self.monitor.start()
        for worker in self.workers.values():
            worker.port.connect(BROKER, BROKER)
            worker.start()
        self.clients.start()
        self.kernel.at(0.0, self._look)
        self.kernel.at(self.setup.stall_s, self._watch)
        self.kernel.run()
        self.check()
        return SimResult(
            self.clients.outcomes,
            {iid: worker.use for iid, worker in self.workers.items()},
            self._counters(),
            self.clients.last_s,
        )

    def _look(self, _: Any) -> None:
        """Whether it is over."""
        if self.clients.over:
            if not self._unfinished():
                self.kernel.stop()
                return
            if self.kernel.now > self.clients.last_s + SETTLE_S:
                raise SimError(f"{SETTLE_S:g} s after the last answer: {self._unfinished()}")
        self.kernel.at(self.kernel.now + LOOK_S, self._look)

    def _watch(self, _: Any) -> None:
        """Raise SimError when nobody computes although requests are open."""
        steps = sum(worker.use.steps for worker in self.workers.values())
        if steps == self._steps and self.clients.open:
            left = f"{self.clients.open} requests are not served: for {self.setup.stall_s:g} s no engine computed"
            raise SimError(f"{left} ({', '.join(self._unfinished()) or 'no instance has them'})")
        self._steps = steps
        self.kernel.at(self.kernel.now + self.setup.stall_s, self._watch)

    def _unfinished(self) -> list[str]:
        return [
            f"{iid} has {len(worker.core.prefill.requests)} jobs and {len(worker.core.decode.requests)} seats"
            for iid, worker in self.workers.items()
            if worker.core.prefill.requests or worker.core.decode.requests
        ]

    # ------------------------------------------------------------ the promises

    def check(self) -> None:
        """Every token that came in went out, every block is back, no row is open, and every core agrees."""
        self.broker.core.tick(self.kernel.now + UNBOUNDED)  # ended requests are forgotten
        if self.broker.core.table.rows:
            raise SimError(f"{len(self.broker.core.table.rows)} rows are left in the broker's table")
        for node in (self.broker, self.monitor, *self.workers.values()):
            node.core.check()
        for iid, worker in self.workers.items():
            core, engine, blocks = worker.core, worker.engine, worker.core.own.capacity.blocks
            engine.check()
            left = [len(core.ledger), blocks - core.ledger.free, blocks - engine.free, len(engine.slots)]
            left += [worker.memory.kept, core.prefill.slots_used]
            if any(left):
                raise SimError(f"{iid} has not given everything back: {left}")
        self._check_tokens()

    def _check_tokens(self) -> None:
        wanted = self._tokens_of(self.clients.outcomes)
        made = (
            sum(worker.use.prefill_tokens for worker in self.workers.values()),
            sum(worker.use.decode_tokens for worker in self.workers.values()),
        )
        exact = all(o.state == "refused" or (o.state == "done" and o.attempts == 1) for o in self.clients.outcomes)
        if made != wanted if exact else made[0] < wanted[0] or made[1] < wanted[1]:
            raise SimError(f"the engines computed {made} tokens of prompts and outputs, the requests had {wanted}")

    @staticmethod
    def _tokens_of(outcomes: list[Outcome]) -> tuple[int, int]:
        """Of prompts, and of outputs without the first of each, which prefill yields."""
        done = [outcome.arrival for outcome in outcomes if outcome.state == "done"]
        return sum(arrival.prompt for arrival in done), sum(arrival.output - 1 for arrival in done)

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
