"""A whole cluster in one process and in virtual time: the broker's core and workers' cores, each worker with the
real emulated engine and a local KV store, joined by links that drop, repeat, delay and break. Everything that
happens follows from the seed.

    story = Cluster(seed=7, faults=Faults.some(seed=7)).run()

`run` raises AssertionError (which names the seed) when a promise is broken. With `log=[]` every event and action is
written down, one line each.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from random import Random
from typing import Any

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
    FromClient,
    LegRejected,
    Reply,
    Send,
    Step,
    Submitted,
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
from tetri.engine.emulated import EmulatedEngine, reference
from tetri.kv.base import KVCorrupt, KVLost
from tetri.kv.local import LocalStore
from tetri.policy.rules import Rules
from tetri.request import Capacity, Sampling
from tetri.text import ByteTokenizer, Stopper
from tetri.wire.clients import Accepted, Attach, Cancel, Delta, Done, Refused
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.messages import Assign, ClusterView, Offer, Ready

VOCABULARY, TOKEN_BYTES = 64, 8
EDGE = ByteTokenizer()


@dataclass(frozen=True)
class Faults:
    """Chances, per message or per second of virtual time and thing; all end at `until`."""

    until: float = 1.0
    drop: float = 0.0
    repeat: float = 0.0
    delay: float = 0.0  # of a message that takes up to `longest_delay`
    longest_delay: float = 0.2
    corrupt: float = 0.0  # of a chunk's copy
    kills: float = 0.0
    blips: float = 0.0  # of each link
    away: float = 0.0  # of each client
    stuck: float = 0.0  # of each client
    cancels: float = 0.0  # of each request, in all

    @classmethod
    def some(cls, seed: int) -> Faults:
        """Some kinds of faults, each hardly ever or often."""
        rng = Random(f"faults {seed}")

        def chance(*values: float) -> float:
            return rng.choice((0.0, *values))

        return cls(
            drop=chance(0.02, 0.2),
            repeat=chance(0.02, 0.2),
            delay=chance(0.05, 0.3),
            corrupt=chance(0.05, 0.4),
            kills=chance(0.5, 2.0),
            blips=chance(0.2, 1.0),
            away=chance(0.5, 2.0),
            stuck=chance(0.5, 2.0),
            cancels=chance(0.1, 0.4),
        )


@dataclass(frozen=True)
class Shape:
    """How big everything is. Small, so that every limit is met."""

    prefills: int = 2
    decodes: int = 2
    requests: int = 8
    blocks: int = 16
    block_tokens: int = 4
    chunk_tokens: int = 8
    max_batch: int = 4
    context: int = 40
    slots: int = 8
    reserve_share: float = 0.5

    @classmethod
    def some(cls, seed: int) -> Shape:
        rng = Random(f"shape {seed}")
        block_tokens, chunk_tokens = rng.choice((1, 2, 4)), rng.choice((4, 8, 16))
        fewest_slots = -(-(chunk_tokens + block_tokens - 1) // block_tokens)
        context = rng.choice((16, 40))
        return cls(
            prefills=rng.choice((1, 2, 2, 3)),
            decodes=rng.choice((1, 2, 2, 3)),
            requests=rng.choice((3, 6, 10)),
            blocks=-(-context // block_tokens) + rng.choice((0, 2, 8, 40)),
            block_tokens=block_tokens,
            chunk_tokens=chunk_tokens,
            max_batch=rng.choice((1, 2, 4, 8)),
            context=context,
            slots=fewest_slots + rng.choice((0, 1, 4, 30)),
            reserve_share=rng.choice((0.2, 0.5, 1.0)),
        )


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
    def __init__(self, world: Cluster, shape: Shape) -> None:
        super().__init__(world, BROKER)
        limits = Limits(
            context=shape.context,
            vocabulary=VOCABULARY,
            max_attempts=1000,
            beat_s=0.05,
            dead_s=0.6,
            patience_s=60.0,
            client_grace_s=2.0,
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
            view_s=0.3,
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


@dataclass
class Client:
    """One client with one request. What it is told must be in order, without gaps and without repetition."""

    world: Cluster
    name: bytes
    prompt: tuple[int, ...]
    sampling: Sampling
    deadline_s: float | None = None
    rid: str | None = None
    ids: list[int] = field(default_factory=list)
    text: str = ""
    done: Done | None = None
    cancelled: bool = False
    away: bool = False
    stuck: bool = False
    heard_at: float = 0.0
    asked: list[int] = field(default_factory=list)  # tokens from which on it asked to hear all again
    expected: int = 0  # the next token that may come
    tail_at: int = -1  # the token at which text without tokens came

    def submit(self) -> None:
        if self.rid is None:
            self.say(Submitted(self.name, self.name.decode(), self.prompt, self.sampling, self.deadline_s))
            self.world.after(0.3, self.submit)

    def say(self, event: Any) -> None:
        broker = self.world.broker
        self.world.after(self.world.rng.uniform(0.0, 0.002), lambda: broker.receive(event))

    def watch(self) -> None:
        """Ask when nothing was heard for a while, as a client's library does."""
        if self.done is not None:
            return
        if self.rid is not None and not self.away and self.world.now - self.heard_at > 0.5:
            self.attach()
        self.world.after(0.4, self.watch)

    def cancel(self) -> None:
        if self.rid is not None and self.done is None:
            self.cancelled = True
            self.say(FromClient(self.name, Cancel(rid=self.rid)))

    def leave(self) -> None:
        self.away = True
        self.world.after(self.world.rng.uniform(0.01, 0.8), self.back)

    def back(self) -> None:
        self.away = False
        if self.rid is not None and self.done is None:
            self.attach()

    def attach(self) -> None:
        assert self.rid is not None
        self.asked.append(len(self.ids))
        self.say(FromClient(self.name, Attach(rid=self.rid, start=len(self.ids))))

    def choke(self) -> None:
        self.stuck = True

        def breathe() -> None:
            self.stuck = False

        self.world.after(self.world.rng.uniform(0.01, 0.2), breathe)

    def hear(self, message: Any) -> str:
        if self.away or self.stuck:
            return "gone" if self.away else "full"
        self.heard_at = self.world.now
        match message:
            case Accepted():
                assert message.key == self.name.decode() and self.rid in (None, message.rid)
                if self.rid is not None:
                    self.asked.append(0)
                self.rid = message.rid
            case Delta() if message.rid == self.rid:
                self._extend(message)
            case Done() if message.rid == self.rid:
                if self.expected == message.usage.completion_tokens:
                    assert self.done in (None, message) and (self.done is None or self.asked or self.cancelled)
                    self.done = message
            case Refused():
                raise AssertionError(f"{self.name!r} is refused: {message}")
        return "sent"

    def _extend(self, delta: Delta) -> None:
        """Nothing comes twice, out of order or after the end, unless it was asked for again."""
        assert self.done is None or self.asked, f"{self.name!r} hears {delta} after the end"
        if delta.start != self.expected:
            assert delta.start in self.asked, f"{self.name!r} has {self.ids} and hears {delta}"
            self.expected = delta.start
        again = self.ids[delta.start : delta.start + len(delta.ids)]
        assert again == delta.ids[: len(again)], f"{self.name!r} has {self.ids} and hears {delta}"
        assert len(again) in (0, len(delta.ids)), f"{self.name!r} has a part of {delta}"
        self.expected += len(delta.ids)
        if delta.ids and again:
            return
        if not delta.ids:
            if not delta.text or self.tail_at == delta.start:
                return
            self.tail_at = delta.start
        self.ids += delta.ids
        self.text += delta.text

    def verify(self) -> None:
        """The tokens are the right ones, all of them unless the request was broken off."""
        done = self.done
        assert done is not None
        right = reference(self.prompt, self.sampling, VOCABULARY, TOKEN_BYTES)
        stopper = Stopper(EDGE, self.sampling.stop)
        released = stopper.feed(right)
        text = released.text + stopper.finish().text
        right = right[: released.counted] if released.stopped else right
        assert done.usage.completion_tokens == len(self.ids)
        assert abs(sum(done.timeline.values()) - done.jct_s) < 1e-6, done
        if done.reason == "cancelled":
            assert self.cancelled or self.world.faults.away
        if done.reason in ("cancelled", "deadline"):
            assert self.ids == right[: len(self.ids)]
            return
        assert (self.ids, self.text) == (right, text)
        ended = released.stopped or (right[-1] == 0 and not self.sampling.ignore_eos)
        assert done.reason == ("stop" if ended else "length"), (done, right)
        assert done.error is None and done.receipt.prompt_tokens == len(self.prompt)


class Cluster:
    """The world: a heap of what happens when, chance, and the promises at the end."""

    def __init__(
        self,
        seed: int,
        faults: Faults | None = None,
        shape: Shape | None = None,
        log: list[str] | None = None,
    ) -> None:
        self.seed, self.log = seed, log
        self.faults, self.shape = faults or Faults(), shape or Shape()
        self.rng = Random(seed)
        self.now = 0.0
        self.segments: dict[str, Any] = {}
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = 0
        self.nodes: dict[str, Node] = {}
        self.broker = self.nodes[BROKER] = BrokerNode(self, self.shape)
        self.broker.wake(0.0)
        self.workers: list[WorkerNode] = []
        for role, count in (("prefill", self.shape.prefills), ("decode", self.shape.decodes)):
            for number in range(count):
                worker = WorkerNode(self, f"{role}-{number}", role, self.shape)
                self.nodes[worker.name] = worker
                self.workers.append(worker)
        self.clients: dict[bytes, Client] = {}
        for number in range(self.shape.requests):
            client = self._client(number)
            self.clients[client.name] = client
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
            self.after(self.rng.uniform(0.01, 0.4), lambda: self._restart(worker))

    def _restart(self, worker: WorkerNode) -> None:
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

    def run(self, limit: float = 30.0) -> Cluster:
        """Until all is over and tidied up. Raises AssertionError with the seed in it."""
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
        return self.now >= self.faults.until and not any(self.unfinished().values())

    def unfinished(self) -> dict[str, list[str]]:
        workers = [worker for worker in self.workers]
        return {
            "without a Done": [str(client.name) for client in self.clients.values() if client.done is None],
            "rows": [f"{row.rid} {row.stage}" for row in self.broker.core.table.rows.values()],
            "jobs": [f"{w.name} {key}" for w in workers for key in w.core.prefill.jobs],
            "seats": [f"{w.name} {key}" for w in workers for key in w.core.decode.seats],
            "dead": [w.name for w in workers if not w.alive],
        }

    def verify(self) -> None:
        for client in self.clients.values():
            client.verify()
        assert not self.broker.stoppers and not self.broker.core.table.keys
        for node in self.nodes.values():
            node.core.check()
        for worker in self.workers:
            core, engine = worker.core, worker.engine
            assert len(core.ledger) == 0 and core.ledger.free == worker.shape.blocks
            assert core.prefill.slots_taken == 0 and worker.store.free_slots == worker.shape.slots
            assert not engine.slots and sorted(engine.free) == list(range(worker.shape.blocks))
            assert not core.dispatcher.offers


def _brief(thing: Any) -> str:
    """One line, without the views, the fingerprints and the samplings that hide everything else."""
    match thing:
        case Send(peer, message):
            return f"to {peer}: {_brief(message)}"
        case ClusterView():
            there = ", ".join(f"{i.iid} {i.load.free_blocks} free" for i in thing.instances)
            return f"view {thing.number}: {there}"
        case Offer():
            return f"Offer({thing.src} {thing.rid} attempt {thing.attempt} offer {thing.offer}, {thing.blocks} blocks)"
        case Assign():
            return f"Assign({thing.rid} attempt {thing.attempt}, {len(thing.prompt)} + {thing.output})"
        case Sampling():
            return f"max {thing.max_tokens} stop {thing.stop}"
        case Ready():
            return f"Ready({thing.iid} {thing.incarnation})"
        case AddLeg(leg):
            return f"AddLeg({leg.key}, {len(leg.tokens)} tokens)"
    return str(thing)


def tell(seed: int, faults: Faults | None = None, shape: Shape | None = None) -> str:
    """The whole story of a seed, to look for what went wrong."""
    log: list[str] = []
    try:
        Cluster(seed, faults, shape, log).run()
    except AssertionError as error:
        log.append(str(error))
    return "\n".join(log)
