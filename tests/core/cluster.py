"""A whole cluster in one process and in virtual time: the cores of the broker, the monitor and the workers, each
worker with the real emulated engine and a local KV store, joined by links that drop, repeat, delay and break. Roles
change all the time. Everything that happens follows from the seed.

    story = Cluster(seed=7, faults=Faults.some(seed=7)).run()

`run` raises AssertionError (which names the seed) when a promise is broken. With `log=[]` every event and action is
written down, one line each; `tell(seed)` gives the whole story of one that failed. With `wire=True` every message
between processes is encoded and decoded as on the wire.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from random import Random
from typing import Any

from tests.core.callers import Admin, Client
from tests.core.links import Link
from tests.core.nodes import VOCABULARY, BrokerNode, MonitorNode, Node
from tests.core.shapes import ROLES, Faults, Shape
from tests.core.worker_node import WorkerNode
from tetri.core.actions import BROKER, Action, AddRequest, Publish, Send
from tetri.kv.local import LocalSlab
from tetri.request import Sampling
from tetri.wire.handover import Offer
from tetri.wire.messages import Assign, Membership, Ready


class Cluster:
    """The world: a heap of what happens when, chance, and the promises at the end."""

    def __init__(
        self,
        seed: int,
        faults: Faults | None = None,
        shape: Shape | None = None,
        log: list[str] | None = None,
        wire: bool = False,
    ) -> None:
        self.seed, self.log, self.wire = seed, log, wire
        self.faults, self.shape = faults or Faults(), shape or Shape()
        self.rng = Random(seed)
        self.now = 0.0
        self.segments: dict[str, Any] = {}
        self.slabs: dict[str, LocalSlab] = {}  # of all that have ever been, by segment
        self.said: dict[tuple[str, str], deque[Any]] = {}  # between two workers, lately
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = 0
        self.nodes: dict[str, Node] = {}
        self.broker = self.nodes[BROKER] = BrokerNode(self, self.shape)
        self.broker.wake(0.0)
        self.monitor = self.nodes["monitor"] = MonitorNode(self, self.shape.flip)
        self.monitor.subscribed(self.broker)
        self.workers: list[WorkerNode] = []
        for role, count in zip(ROLES, (self.shape.prefills, self.shape.decodes, self.shape.mixed), strict=True):
            for number in range(count):
                worker = WorkerNode(self, f"{role}-{number}", role, self.shape)
                self.nodes[worker.name] = worker
                self.workers.append(worker)
                self.monitor.subscribed(worker)
        self.admin = Admin(self)
        self.callers: dict[bytes, Client | Admin] = {self.admin.name: self.admin}
        self.clients: dict[bytes, Client] = {}
        for number in range(self.shape.requests):
            client = self._client(number)
            self.clients[client.name] = self.callers[client.name] = client
            self.at(self.rng.uniform(0.0, self.faults.until / 2), client.submit)
            self.at(self.rng.uniform(0.0, 0.4), client.watch)
        self._plan_faults()

    def _client(self, number: int) -> Client:
        rng, shape = self.rng, self.shape
        prompt = rng.randint(1, shape.context - 1)
        most = min(shape.context - prompt, 16)
        drawn = rng.random() < 0.3
        sampling = Sampling(
            max_tokens=rng.randint(1, most),
            temperature=0.7 if drawn else 0.0,
            seed=rng.getrandbits(20) if drawn else None,
            stop=rng.choice(([], [], ["A", "!\u001f"], ["7"])),
            ignore_eos=rng.random() < 0.5,
        )
        ids = tuple(rng.randrange(VOCABULARY) for _ in range(prompt))
        return Client(self, f"client-{number}".encode(), ids, sampling, rng.choice((None, None, None, 3.0)))

    def _plan_faults(self) -> None:
        faults, rng = self.faults, self.rng
        self._often(faults.kills * len(self.workers), self._kill)
        self._often(faults.monitor_kills, self._kill_monitor)
        self._often(faults.flips, lambda: self.admin.flip(rng.choice(self.workers).name, rng.choice(ROLES)))
        for client in self.clients.values():
            self._often(faults.away, client.leave)
            self._often(faults.stuck, client.choke)
            if rng.random() < faults.cancels:
                self.at(rng.uniform(0.0, faults.until), client.cancel)
        self._often(faults.blips * (len(self.workers) + 1) ** 2 / 2, self._blip)

    def _often(self, rate: float, what: Callable[[], None]) -> None:
        when = 0.0
        while rate and (when := when + self.rng.expovariate(rate)) < self.faults.until:
            self.at(when, what)

    def _kill(self) -> None:
        worker = self.rng.choice(self.workers)
        if worker.alive:
            worker.kill()
            away_s = self.rng.choice((0.4, 0.4, 1.5))  # the longest: the monitor finds another for its role
            self.after(self.rng.uniform(0.01, away_s), lambda: self.restart(worker))

    def _kill_monitor(self) -> None:
        if self.monitor.alive:
            self.monitor.kill()
            self.after(self.rng.uniform(0.01, 1.0), self.monitor.start)

    def restart(self, worker: WorkerNode) -> None:
        worker.start()
        for link in self.links():
            if link.dst is worker:
                link.broken()  # had it not been found out before
                link.connect()

    def _blip(self) -> None:
        links = [link for link in self.links() if link.up]
        if links:
            link = self.rng.choice(links)
            self.note(link.src.name, f"loses its connection to {link.peer}", [])
            link.broken()

    # ------------------------------------------------------------ what the parts need

    def links(self) -> list[Link]:
        return [link for node in self.nodes.values() for link in node.links.values()]

    def at(self, when: float, what: Callable[[], None]) -> None:
        self._serial += 1
        heappush(self._heap, (when, self._serial, what))

    def after(self, seconds: float, what: Callable[[], None]) -> None:
        self.at(self.now + seconds, what)

    def happens(self, chance: float) -> bool:
        return bool(chance) and self.now < self.faults.until and self.rng.random() < chance

    def note(self, who: str, event: Any, actions: list[Action]) -> None:
        if self.log is not None:
            self.log.append(f"{self.now:.4f} {who}: {_brief(event)}")
            self.log.extend(f"       -> {_brief(action)}" for action in actions)

    # ------------------------------------------------------------ the story

    def run(self, limit: float = 55.0) -> Cluster:
        """Until all is over and tidied up. Raises AssertionError with the seed in it. A monitor that was restarted
        when nobody was left for a role takes 45 s to give it to somebody."""
        try:
            while not self.over():
                self.now, _, what = heappop(self._heap)
                assert self.now < self.faults.until + limit, f"not over after {limit} s: {self.unfinished()}"
                what()
            self.verify()
        except Exception as error:
            raise AssertionError(f"seed {self.seed}, {self.now:.4f} s: {error}") from error
        return self

    def over(self) -> bool:
        if self.now < self.faults.until or self.broker.core.table.open:
            return False
        return not any(self.unfinished().values())

    def unfinished(self) -> dict[str, list[str]]:
        workers = self.workers
        return {
            "without a Done": [str(client.name) for client in self.clients.values() if client.done is None],
            "rows": [f"{row.rid} {row.stage}" for row in self.broker.core.table.active()],
            "jobs": [f"{w.name} {key}" for w in workers for key in w.core.prefill.requests],
            "seats": [f"{w.name} {key}" for w in workers for key in w.core.decode.requests],
            "dead": [node.name for node in (*workers, self.monitor) if not node.alive],
        }

    def verify(self) -> None:
        for client in self.clients.values():
            client.verify()
        self.broker.core.tick(self.now + 60.0)  # long after: ended requests are forgotten
        assert not self.broker.stoppers and not self.broker.core.table.rows and not self.broker.core.table.keys
        for node in self.nodes.values():
            node.core.check()
        for worker in self.workers:
            core, engine = worker.core, worker.engine
            assert len(core.ledger) == 0 and core.ledger.free == worker.shape.blocks
            assert core.prefill.slots_used == 0 and worker.store.free_slots == worker.shape.slots
            assert not engine.contents and sorted(engine.free) == list(range(worker.shape.blocks))
            assert not core.dispatcher.offers


def _brief(thing: Any) -> str:
    """One line, without the views, the fingerprints and the samplings that hide everything else."""
    match thing:
        case Send(peer, message):
            return f"to {peer}: {_brief(message)}"
        case Publish(message):
            return f"publishes {type(message).__name__}"
        case Membership():
            there = ", ".join(f"{i.iid} {i.role}" for i in thing.instances)
            return f"roster {thing.number}: {there}"
        case Offer():
            return f"Offer({thing.src} {thing.rid} attempt {thing.attempt} offer {thing.offer}, {thing.blocks} blocks)"
        case Assign():
            return f"Assign({thing.rid} attempt {thing.attempt}, {len(thing.prompt)} + {thing.output})"
        case Sampling():
            return f"max {thing.max_tokens} stop {thing.stop}"
        case Ready():
            return f"Ready({thing.instance.iid} {thing.instance.incarnation})"
        case AddRequest(engine_request):
            return f"AddRequest({engine_request.key}, {len(engine_request.tokens)} tokens)"
    return str(thing)


def tell(seed: int, faults: Faults | None = None, shape: Shape | None = None) -> str:
    """The whole story of a seed, to look for what went wrong."""
    log: list[str] = []
    try:
        Cluster(seed, faults, shape, log).run()
    except AssertionError as error:
        log.append(str(error))
    return "\n".join(log)
