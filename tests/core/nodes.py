"""The processes of the virtual cluster (tests/core/cluster.py)."""

from __future__ import annotations

from collections import deque
from random import Random
from typing import TYPE_CHECKING, Any

from tests.core.links import Feed, Link
from tetri.core.actions import (
    BROKER,
    Action,
    Connect,
    Detokenize,
    Detokenized,
    Disconnect,
    Publish,
    Release,
    Reply,
    Send,
    Undelivered,
)
from tetri.core.broker.broker import Broker
from tetri.core.broker.delivery import Limits
from tetri.core.monitor import Monitor
from tetri.policy.views import FlipSettings
from tetri.text import ByteTokenizer, Stopper
from tetri.wire.messages import ClusterView, InboxMessage, LoadReport, WorkerEvent

if TYPE_CHECKING:
    from tests.core.cluster import Cluster
    from tests.core.shapes import Shape

VOCABULARY, TOKEN_BYTES = 64, 8
EDGE = ByteTokenizer()


class Node:
    """A process: an inbox, read between two turns of its loop, and a core."""

    name: str
    core: Any
    reads: Any = InboxMessage

    def __init__(self, world: Cluster, name: str) -> None:
        self.world, self.name = world, name
        self.alive, self.lifecycle = True, 0
        self.inbox: deque[Any] = deque()
        self.links: dict[str, Link] = {}
        self.feeds: list[Feed] = []  # to the subscribers
        self._turn_at: float | None = None

    def receive(self, event: Any) -> None:
        self.inbox.append(event)
        self.wake(self.world.now)

    def wake(self, when: float) -> None:
        if self._turn_at is not None and self._turn_at <= when:
            return
        self._turn_at = when
        lifecycle = self.lifecycle
        self.world.at(when, lambda: self._turn(when, lifecycle))

    def _turn(self, when: float, lifecycle: int) -> None:
        if self._turn_at != when or not self.alive or lifecycle != self.lifecycle:
            return
        self._turn_at = None
        if self.resting():
            return
        self.listen()
        self.perform(self.core.tick(self.world.now), "tick")
        deadline = self.core.deadline()
        if deadline is not None:
            self.wake(max(deadline, self.world.now))

    def resting(self) -> bool:
        return False

    def listen(self) -> None:
        while self.inbox:
            self.handle(self.inbox.popleft())

    def handle(self, event: Any) -> None:
        self.perform(self.core.handle(event, self.world.now), event)

    def perform(self, actions: list[Action], why: Any) -> None:
        if actions or why != "tick":
            self.world.note(self.name, why, actions)
        self.act(actions)
        self.core.check()

    def act(self, actions: list[Action]) -> None:
        for action in actions:
            result = self.do(action)
            if result is not None:
                follow = self.core.handle(result, self.world.now)
                self.world.note(self.name, result, follow)
                self.act(follow)

    def do(self, action: Action) -> Any:
        match action:
            case Send(peer, message):
                self.send(peer, message)
            case Publish(message):
                self.publish(message)
            case Connect(peer, address):
                self.connect(peer, address)
            case Disconnect(peer):
                self.disconnect(peer)
            case _:
                raise AssertionError(f"{self.name}: nobody can do {action}")
        return None

    def send(self, peer: str, message: Any) -> None:
        if peer in self.links:
            self.links[peer].send(message)

    def publish(self, message: Any) -> None:
        for feed in self.feeds:
            feed.send(message)

    def connect(self, peer: str, address: str) -> None:
        if peer not in self.links:
            self.links[peer] = Link(self.world, self, self.world.nodes[address], peer)
            self.links[peer].connect()

    def disconnect(self, peer: str) -> None:
        if peer in self.links:
            self.links.pop(peer).close()

    def kill(self) -> None:
        """As kill -9: what it sent lately may still arrive or not, all that it had is gone."""
        self.world.note(self.name, "killed", [])
        self.alive = False
        self.lifecycle += 1
        self.inbox.clear()
        for link in self.links.values():
            link.close()
        self.links = {}
        self._turn_at = None
        for link in self.world.links():
            if link.dst is self:
                self.world.after(self.world.rng.uniform(0.0, 0.03), link.broken)


class BrokerNode(Node):
    reads = WorkerEvent

    def __init__(self, world: Cluster, shape: Shape) -> None:
        super().__init__(world, BROKER)
        limits = Limits(
            context=shape.context,
            vocabulary=VOCABULARY,
            max_attempts=1000,
            heartbeat_s=0.05,
            dead_s=0.6,
            patience_s=60.0,
            client_grace_s=2.5,
        )
        epoch = world.rng.getrandbits(62)
        self.core = Broker(
            limits, shape.rules, epoch, Random(epoch), 0.0, cost=shape.cost, chunk_tokens=shape.chunk_tokens
        )
        self.stoppers: dict[str, Stopper] = {}
        self.stuck: dict[bytes, None] = {}

    def perform(self, actions: list[Action], why: Any) -> None:
        self.stuck.clear()
        super().perform(actions, why)

    def do(self, action: Action) -> Any:
        match action:
            case Reply(name, message):
                heard = "full" if name in self.stuck else self.world.callers[name].hear(message)
                if heard != "sent":
                    self.stuck[name] = None
                    return Undelivered(name, message, heard == "gone")
                return None
            case Detokenize(rid, start, ids, stop, final):
                stopper = self.stoppers.setdefault(rid, Stopper(EDGE, stop))
                released = stopper.feed(ids)
                text = released.text
                if final and not released.stopped:
                    released = stopper.finish()
                    text += released.text
                return Detokenized(rid, start, ids, text, released.counted if released.stopped else None, final)
            case Release(rid):
                del self.stoppers[rid]
                return None
        return super().do(action)


class MonitorNode(Node):
    """The monitor, which may die and begin anew. `policy`: of its transition watcher."""

    reads = LoadReport

    def __init__(self, world: Cluster, policy: str) -> None:
        super().__init__(world, "monitor")
        self.policy = policy
        self.start()

    def start(self) -> None:
        self.alive = True
        settings = FlipSettings(idle_s=0.05, low_s=0.1, hold_s=0.1, floor=1, gain=1.5)
        epoch, now = self.world.rng.getrandbits(62), self.world.now
        self.core = Monitor(self.policy, settings, epoch, 0.02, now, stale_s=0.1, gone_s=0.4)
        self.connect(BROKER, BROKER)
        self.wake(now)

    def subscribed(self, node: Node) -> None:
        """This node hears the views."""
        self.feeds.append(Feed(self.world, node, ClusterView))
