"""A worker's process of the virtual cluster (tests/core/cluster.py), with the real emulated engine."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from tests.core.nodes import TOKEN_BYTES, VOCABULARY, Feed, Node
from tetri.core.actions import BROKER, Action, Adopt, Adopted, LengthKnown, Predict
from tetri.core.peers import Identity
from tetri.core.worker import Worker
from tetri.engine.emulated import EmulatedEngine
from tetri.hands import Copies, WorkerHands
from tetri.kv.local import LocalReader, LocalSlab
from tetri.kv.store import Store
from tetri.request import Capacity, LengthRange, Reach
from tetri.wire.messages import LoadReport

if TYPE_CHECKING:
    from tests.core.cluster import Cluster
    from tests.core.shapes import Shape


class SpoiltCopies(Copies):
    """Now and then a copy is not what was announced."""

    def __init__(self, world: Cluster, engine: EmulatedEngine, store: Store) -> None:
        super().__init__(engine, store, lambda error, key, chunk: world.note(key, f"chunk {chunk}: {error}", []))
        self.world = world

    def adopt(self, action: Adopt) -> Adopted:
        if self.world.happens(self.world.faults.corrupt):
            action = replace(action, digest=action.digest ^ 1)
        return super().adopt(action)


class WorkerNode(Node):
    def __init__(self, world: Cluster, iid: str, role: str, shape: Shape) -> None:
        super().__init__(world, iid)
        self.role, self.shape = role, shape
        self.busy_until = 0.0
        self.feeds = [Feed(world, world.monitor, LoadReport)]
        self.start()

    def start(self) -> None:
        shape, world = self.shape, self.world
        self.alive = True
        self.engine = EmulatedEngine(
            capacity=Capacity(
                blocks=shape.blocks,
                block_tokens=shape.block_tokens,
                chunk_tokens=shape.chunk_tokens,
                max_batch=shape.max_batch,
                context=shape.context,
            ),
            token_bytes=TOKEN_BYTES,
            vocabulary=VOCABULARY,
            cost=shape.cost,
            wait=lambda seconds: world.rng.random() < 0.2,  # a message may wait after any pass
            clock=lambda: 0.0,
        )
        slab = LocalSlab(self.name, shape.slots, self.engine.fingerprint.block_bytes, world.segments)
        reader = LocalReader(world.segments)
        reach = Reach(paths=["local"], host="h", process=0, segment=slab.segment.name)
        self.store = Store(slab, {"local": reader}, reach, reader)
        own = Identity(
            iid=self.name,
            incarnation=world.rng.getrandbits(62),
            role=self.role,
            inbox=self.name,
            fingerprint=self.engine.fingerprint,
            capacity=self.engine.capacity,
            reach=reach,
            slots=shape.slots,
            rules=shape.rules,
            cost=shape.cost,
            reserve_share=shape.reserve_share,
            beat_s=0.05,
            load_s=0.02,
            offer_s=0.08,
            patience_s=60.0,
            view_s=1.2,
            stream_interval=shape.stream_interval,
        )
        self.core = Worker(own, Random(own.incarnation), world.now)
        copies = SpoiltCopies(world, self.engine, self.store)
        noted = NotedCore(self)
        self.hands = WorkerHands(noted, lambda: world.now, self.engine, copies, self, self.step, self.predict)
        self.connect(BROKER, BROKER)
        self.wake(world.now)

    def act(self, actions: list[Action]) -> None:
        self.hands.carry_out(actions)

    def kill(self) -> None:
        super().kill()
        self.store.close()
        self.busy_until = 0.0

    def resting(self) -> bool:
        return self.world.now < self.busy_until

    def step(self, most: int) -> None:
        """The engine computes for a while, in which nothing is read."""
        done, life = self.engine.step(most), self.life
        self.busy_until = self.world.now + done.steps * self.world.rng.uniform(0.001, 0.008)

        def finished() -> None:
            if life == self.life:
                self.handle(done)
                self.wake(self.world.now)

        self.world.at(self.busy_until, finished)

    def predict(self, wanted: Predict) -> LengthKnown | None:
        """Sometimes nobody can say, sometimes it is far off, sometimes it takes a while, or for ever."""
        rng, life = self.world.rng, self.life
        low = max(0, wanted.sampling.max_tokens + rng.randint(-8, 4))
        known = LengthKnown(wanted.key, rng.choice((None, LengthRange(low=low, high=low + rng.randint(1, 8)))))
        if rng.random() < 0.3:
            return known

        def later() -> None:
            if life == self.life:
                self.receive(known)

        if not self.world.happens(self.world.faults.mute):
            self.world.after(rng.uniform(0.0, 0.05), later)
        return None


class NotedCore:
    """The core, for the hands: what it says to an action's result is written down."""

    def __init__(self, node: WorkerNode) -> None:
        self.node = node

    def handle(self, event: Any, now: float) -> list[Action]:
        actions = self.node.core.handle(event, now)
        self.node.world.note(self.node.name, event, actions)
        return actions
