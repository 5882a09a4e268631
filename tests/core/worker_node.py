"""A worker's process of the virtual cluster (tests/core/cluster.py), with the real emulated engine."""

from __future__ import annotations

import dataclasses
from random import Random
from typing import TYPE_CHECKING, Any

from tests.core.links import Feed
from tests.core.nodes import TOKEN_BYTES, VOCABULARY, Node
from tests.core.worker_kv import SpoiltCopies, store
from tetri.core.actions import BROKER, Action, LengthKnown, Predict
from tetri.core.instance.identity import Identity
from tetri.core.worker.worker import Worker
from tetri.engine.emulated import EmulatedEngine
from tetri.engine_request import HiddenStateEstimate, StepDone
from tetri.executor import WorkerExecutor
from tetri.instance import Instance
from tetri.request import Capacity, Expected, LengthDistribution, LengthRange
from tetri.wire.messages import LoadReport

if TYPE_CHECKING:
    from tests.core.cluster import Cluster
    from tests.core.shapes import Shape


PATHS = (("stream",), ("stream",), ("local", "stream"))  # any two have one in common


WIDE = LengthDistribution(2, (0.1,) * 10)  # what is known of lengths before any has come


def some_odds(rng: Random) -> LengthDistribution:
    """Nearly sure of anything, or of nothing."""
    bucket, sure = rng.randrange(5), rng.choice((0.9, 0.2))
    return LengthDistribution(4, tuple(sure if place == bucket else (1.0 - sure) / 4 for place in range(5)))


class WorkerNode(Node):
    def __init__(self, world: Cluster, iid: str, role: str, shape: Shape) -> None:
        super().__init__(world, iid)
        self.role, self.shape = role, shape
        self.busy_until = 0.0
        self.named: list[LengthKnown] = []  # while the engine computed
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
        paths = world.rng.choice(PATHS) if shape.far else ("local",)
        self.store = store(self, paths, shape.slots, self.engine.fingerprint.block_bytes)
        instance = Instance(
            iid=self.name,
            incarnation=world.rng.getrandbits(62),
            role=self.role,
            inbox=self.name,
            fingerprint=self.engine.fingerprint,
            capacity=self.engine.capacity,
            reach=self.store.reach,
        )
        own = Identity(
            instance,
            slots=shape.slots,
            rules=shape.rules,
            cost=shape.cost,
            reserve_share=shape.reserve_share,
            heartbeat_s=0.05,
            load_s=0.02,
            offer_s=0.08,
            patience_s=60.0,
            view_s=1.2,
            stream_interval=shape.stream_interval,
            expected=Expected(shape.expects, WIDE) if shape.expects else None,
        )
        self.core = Worker(own, Random(own.incarnation), world.now)
        self.copies = SpoiltCopies(world, self.engine, self.store)
        noted = NotedCore(self)
        self.executor = WorkerExecutor(
            noted, lambda: world.now, self.engine, self.copies, self, self.step, self.predict
        )
        self.connect(BROKER, BROKER)
        self.wake(world.now)

    def listen(self) -> None:
        super().listen()
        for event in self.copies.events():
            self.handle(event)

    def act(self, actions: list[Action]) -> None:
        self.executor.carry_out(actions)

    def kill(self) -> None:
        super().kill()
        self.store.close()
        self.busy_until = 0.0
        self.named = []

    def resting(self) -> bool:
        return self.world.now < self.busy_until

    def step(self, most: int) -> None:
        """The engine computes for a while, in which nothing is read but what the predictor says."""
        done, lifecycle = self.estimates(self.engine.step(most)), self.lifecycle
        self.busy_until = self.world.now + done.steps * self.world.rng.uniform(0.001, 0.008)

        def finished() -> None:
            if lifecycle == self.lifecycle:
                named, self.named = self.named, []
                for event in (*named, done):
                    self.handle(event)
                self.wake(self.world.now)

        self.world.at(self.busy_until, finished)

    def estimates(self, done: StepDone) -> StepDone:
        """What hidden states say: mostly of prompts that have ended, now and then of decodes, anything at all."""
        if self.shape.expects not in ("hidden", "both"):
            return done
        rng, core, told = self.world.rng, self.core, list[HiddenStateEstimate]()
        for sampled in done.tokens:
            request = core.prefill.requests.get(sampled.key)
            chance, outputs = (
                (0.8, len(request.output)) if request else (0.2, core.decode.requests[sampled.key].written)
            )
            if rng.random() < chance and not self.world.happens(self.world.faults.mute):
                told.append(HiddenStateEstimate(sampled.key, outputs, some_odds(rng)))
        return dataclasses.replace(done, estimates=tuple(told))

    def predict(self, wanted: Predict) -> LengthKnown | None:
        """Sometimes nobody can say, sometimes it is far off, sometimes it takes a while, or for ever."""
        rng, lifecycle = self.world.rng, self.lifecycle
        low = max(0, wanted.sampling.max_tokens + rng.randint(-8, 4))
        known = LengthKnown(wanted.key, rng.choice((None, LengthRange(low=low, high=low + rng.randint(1, 8)))))
        if self.shape.expects:
            known = LengthKnown(wanted.key, None, rng.choice((None, some_odds(rng), some_odds(rng))))
        if rng.random() < 0.3:
            return known

        def later() -> None:
            if lifecycle == self.lifecycle and self.resting():
                self.named.append(known)
            elif lifecycle == self.lifecycle:
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
