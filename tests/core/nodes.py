"""The processes of the virtual cluster (tests/core/cluster.py) and the links between them."""

from __future__ import annotations

from collections import deque
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any

from tetri.core.actions import (
    BROKER,
    Action,
    AddLeg,
    AdmitLeg,
    Adopt,
    Adopted,
    CancelLeg,
    Connect,
    Disconnect,
    Export,
    Exported,
    Forget,
    Free,
    LegRejected,
    Reply,
    Send,
    Step,
    Undelivered,
    Unword,
    Word,
    Worded,
)
from tetri.core.broker import Broker
from tetri.core.desk import Limits
from tetri.core.peers import Identity
from tetri.core.worker import Worker
from tetri.cost import Cost
from tetri.engine.base import EngineError
from tetri.engine.emulated import EmulatedEngine
from tetri.kv.base import KVCorrupt, KVLost
from tetri.kv.local import LocalStore
from tetri.policy.rules import Rules
from tetri.request import Capacity
from tetri.text import ByteTokenizer, Stopper
from tetri.wire.codec import decode, encode
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.messages import InboxMessage, WorkerEvent

if TYPE_CHECKING:
    from tests.core.cluster import Cluster, Shape

VOCABULARY, TOKEN_BYTES = 64, 8
EDGE = ByteTokenizer()


class Link:
    """One direction from `src` to `dst`: first in, first out. What is under way when it breaks is lost."""

    def __init__(self, world: Cluster, src: Node, dst: Node, peer: str) -> None:
        self.world, self.src, self.dst, self.peer = world, src, dst, peer
        self.up, self.closed = False, False
        self.life = 0  # counts connections
        self.busy = 0.0  # when the last message arrives

    def send(self, message: Any) -> None:
        world = self.world
        if not self.up or world.happens(world.faults.drop):
            return
        if world.wire:
            message = decode(encode(message), self.dst.reads)
        for _ in range(2 if world.happens(world.faults.repeat) else 1):
            slow = world.happens(world.faults.delay)
            took = world.rng.uniform(0.0, world.faults.longest_delay if slow else 0.002)
            self.busy = max(self.busy, world.now + took)
            world.at(self.busy, partial(self._arrive, message, self.life, self.dst.life))

    def _arrive(self, message: Any, life: int, target: int) -> None:
        if life == self.life and target == self.dst.life and self.dst.alive:
            self.dst.receive(message)

    def connect(self) -> None:
        """After a while, if both are there then."""
        life = self.src.life

        def stands() -> None:
            if self.closed or self.up or not self.dst.alive or not self.src.alive or self.src.life != life:
                return
            self.up = True
            self.src.receive(PeerUp(self.peer))

        self.world.after(self.world.rng.uniform(0.001, 0.02), stands)

    def broken(self) -> None:
        """The connection is lost: found out soon, made again when somebody is there."""
        if not self.up:
            return
        self.up = False
        self.life += 1
        self.src.receive(PeerDown(self.peer))
        self.connect()

    def close(self) -> None:
        self.closed, self.up = True, False
        if self.world.happens(0.5):
            self.life += 1  # what was under way is lost


class Node:
    """A process: an inbox, read between two turns of its loop, and a core."""

    name: str
    core: Any
    reads: Any = InboxMessage

    def __init__(self, world: Cluster, name: str) -> None:
        self.world, self.name = world, name
        self.alive, self.life = True, 0
        self.inbox: deque[Any] = deque()
        self.links: dict[str, Link] = {}
        self._turn_at: float | None = None

    def receive(self, event: Any) -> None:
        self.inbox.append(event)
        self.wake(self.world.now)

    def wake(self, when: float) -> None:
        if self._turn_at is not None and self._turn_at <= when:
            return
        self._turn_at = when
        life = self.life
        self.world.at(when, lambda: self._turn(when, life))

    def _turn(self, when: float, life: int) -> None:
        if self._turn_at != when or not self.alive or life != self.life:
            return
        self._turn_at = None
        if self.resting():
            return
        while self.inbox:
            self.handle(self.inbox.popleft())
        self.perform(self.core.tick(self.world.now), "tick")
        deadline = self.core.deadline()
        if deadline is not None:
            self.wake(max(deadline, self.world.now))

    def resting(self) -> bool:
        return False

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
                if peer in self.links:
                    self.links[peer].send(message)
            case Connect(peer, address):
                self.connect(peer, address)
            case Disconnect(peer):
                if peer in self.links:
                    self.links.pop(peer).close()
            case _:
                raise AssertionError(f"{self.name}: nobody can do {action}")
        return None

    def connect(self, peer: str, address: str) -> None:
        if peer not in self.links:
            self.links[peer] = Link(self.world, self, self.world.nodes[address], peer)
            self.links[peer].connect()


class BrokerNode(Node):
    reads = WorkerEvent

    def __init__(self, world: Cluster, shape: Shape) -> None:
        super().__init__(world, BROKER)
        limits = Limits(
            context=shape.context,
            vocabulary=VOCABULARY,
            max_attempts=1000,
            beat_s=0.05,
            dead_s=0.6,
            patience_s=60.0,
            client_grace_s=2.5,
        )
        self.core = Broker(limits, Rules(), epoch=world.rng.getrandbits(62), rng=Random(1), now=0.0)
        self.stoppers: dict[str, Stopper] = {}
        self.stuck: dict[bytes, None] = {}

    def perform(self, actions: list[Action], why: Any) -> None:
        self.stuck.clear()
        super().perform(actions, why)

    def do(self, action: Action) -> Any:
        match action:
            case Reply(name, message):
                heard = "full" if name in self.stuck else self.world.clients[name].hear(message)
                if heard != "sent":
                    self.stuck[name] = None
                    return Undelivered(name, message, heard == "gone")
                return None
            case Word(rid, start, ids, stop, final):
                stopper = self.stoppers.setdefault(rid, Stopper(EDGE, stop))
                released = stopper.feed(ids)
                text = released.text
                if final and not released.stopped:
                    released = stopper.finish()
                    text += released.text
                return Worded(rid, start, ids, text, released.counted if released.stopped else None, final)
            case Unword(rid):
                del self.stoppers[rid]
                return None
        return super().do(action)


class WorkerNode(Node):
    def __init__(self, world: Cluster, iid: str, role: str, shape: Shape) -> None:
        super().__init__(world, iid)
        self.role, self.shape = role, shape
        self.busy_until = 0.0
        self.start()

    def start(self) -> None:
        shape = self.shape
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
            cost=Cost(),
        )
        self.store = LocalStore(self.name, shape.slots, self.engine.fingerprint.block_bytes, self.world.segments)
        own = Identity(
            iid=self.name,
            incarnation=self.world.rng.getrandbits(62),
            role=self.role,
            inbox=self.name,
            fingerprint=self.engine.fingerprint,
            capacity=self.engine.capacity,
            transport="local",
            slots=shape.slots,
            reserve_share=shape.reserve_share,
            beat_s=0.05,
            offer_s=0.08,
            patience_s=60.0,
            view_s=1.2,
        )
        self.core = Worker(own, Random(own.incarnation), self.world.now)
        if BROKER in self.world.nodes:
            self.connect(BROKER, BROKER)
        self.wake(self.world.now)

    def kill(self) -> None:
        """As kill -9: what it sent lately may still arrive or not, all that it had is gone."""
        self.world.note(self.name, "killed", [])
        self.alive = False
        self.life += 1
        self.store.close()
        self.inbox.clear()
        for link in self.links.values():
            link.close()
        self.links = {}
        self._turn_at, self.busy_until = None, 0.0
        for link in self.world.links():
            if link.dst is self:
                self.world.after(self.world.rng.uniform(0.0, 0.03), link.broken)

    def resting(self) -> bool:
        return self.world.now < self.busy_until

    def do(self, action: Action) -> Any:
        match action:
            case Step():
                self.step()
            case Export(key, index, start, stop):
                handle, digest = self.store.put(
                    stop - start, lambda into: self.engine.export(key, start, stop, into)
                )
                return Exported(key, index, start, stop, handle, digest)
            case Adopt():
                return self.adopt(action)
            case AddLeg(leg):
                try:
                    self.engine.add(leg)
                except EngineError as error:
                    return LegRejected(leg.key, str(error))
            case CancelLeg(key):
                self.engine.cancel(key)
            case AdmitLeg(key, token):
                self.engine.admit(key, token)
            case Free(handle):
                self.store.free(handle)
            case Forget(segment):
                self.store.forget(segment)
            case _:
                return super().do(action)
        return None

    def step(self) -> None:
        """The engine computes for a while, in which nothing is read."""
        done, life = self.engine.step(), self.life
        self.busy_until = self.world.now + self.world.rng.uniform(0.001, 0.008)

        def finished() -> None:
            if life == self.life:
                self.handle(done)
                self.wake(self.world.now)

        self.world.at(self.busy_until, finished)

    def adopt(self, action: Adopt) -> Adopted:
        wrong = self.world.happens(self.world.faults.corrupt)
        try:
            blocks = self.store.take(action.handle, action.digest ^ wrong)
        except KVCorrupt:
            return Adopted(action.key, action.index, "corrupt")
        except KVLost:
            return Adopted(action.key, action.index, "lost")
        self.engine.adopt(action.key, action.start, blocks)
        return Adopted(action.key, action.index)
