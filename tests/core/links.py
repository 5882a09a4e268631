"""The connections of the virtual cluster (tests/core/cluster.py), and what goes wrong on them."""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from tetri.wire.codec import decode, encode
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.handover import BetweenWorkers, Chunk

if TYPE_CHECKING:
    from tests.core.cluster import Cluster
    from tests.core.nodes import Node


class Link:
    """One direction from `src` to `dst`: first in, first out. What is under way when it breaks is lost."""

    def __init__(self, world: Cluster, src: Node, dst: Node, peer: str) -> None:
        self.world, self.src, self.dst, self.peer = world, src, dst, peer
        self.up, self.closed = False, False
        self.lifecycle = 0  # counts connections
        self.busy = 0.0  # when the last message arrives

    def send(self, message: Any) -> None:
        world = self.world
        if not self.up or world.happens(world.faults.drop):
            return
        if world.wire:
            message = decode(encode(message), self.dst.reads)
        if isinstance(message, BetweenWorkers):
            message = self._mixed_up(message)
        for _ in range(2 if world.happens(world.faults.repeat) else 1):
            slow = world.happens(world.faults.delay)
            took = world.rng.uniform(0.0, world.faults.longest_delay if slow else 0.002)
            self.busy = max(self.busy, world.now + took)
            world.at(self.busy, partial(self._arrive, message, self.lifecycle, self.dst.lifecycle))

    def _mixed_up(self, message: BetweenWorkers) -> BetweenWorkers:
        """What no connection does, and a broken sender might: old messages come again, also of its earlier life, later
        ones come before it, and a chunk lies in another slab, in fewer slots, or has a token too many or too few."""
        world, faults = self.world, self.world.faults
        old = world.said.setdefault((self.src.name, self.dst.name), deque(maxlen=40))
        if old and world.happens(faults.replay):
            again = world.rng.choice(old)
            world.after(world.rng.uniform(0.0, 0.05), partial(self._arrive, again, self.lifecycle, self.dst.lifecycle))
        old.append(message)
        if world.happens(faults.overtake):
            world.after(
                world.rng.uniform(0.0, 0.02), partial(self._arrive, message, self.lifecycle, self.dst.lifecycle)
            )
        return self._mangled(message) if isinstance(message, Chunk) and world.happens(faults.mangle) else message

    def _mangled(self, chunk: Chunk) -> Chunk:
        handle, rng = chunk.handle, self.world.rng
        match rng.randrange(3):
            case 0:
                return replace(chunk, token=5 if chunk.token is None else None)
            case 1:
                return replace(chunk, handle=replace(handle, segment=rng.choice(list(self.world.slabs))))
        return replace(chunk, handle=replace(handle, slots=handle.slots[1:], generations=handle.generations[1:]))

    def _arrive(self, message: Any, lifecycle: int, target: int) -> None:
        if lifecycle == self.lifecycle and target == self.dst.lifecycle and self.dst.alive:
            self.dst.receive(message)

    def connect(self) -> None:
        """After a while, if both are there then."""
        lifecycle = self.src.lifecycle

        def stands() -> None:
            if self.closed or self.up or not self.dst.alive or not self.src.alive or self.src.lifecycle != lifecycle:
                return
            self.up = True
            self.src.receive(PeerUp(self.peer))

        self.world.after(self.world.rng.uniform(0.001, 0.02), stands)

    def broken(self) -> None:
        """The connection is lost: found out soon, made again when somebody is there."""
        if not self.up:
            return
        self.up = False
        self.lifecycle += 1
        self.src.receive(PeerDown(self.peer))
        self.connect()

    def close(self) -> None:
        self.closed, self.up = True, False
        if self.world.happens(0.5):
            self.lifecycle += 1  # what was under way is lost


class Feed:
    """What one process publishes, as one subscriber hears it: in order, any of it may be lost, and nobody is told."""

    def __init__(self, world: Cluster, dst: Node, kind: Any) -> None:
        self.world, self.dst, self.kind = world, dst, kind
        self.busy = 0.0

    def send(self, message: Any) -> None:
        world = self.world
        if world.happens(world.faults.drop):
            return
        if world.wire:
            message = decode(encode(message), self.kind)
        slow = world.happens(world.faults.delay)
        took = world.rng.uniform(0.0, world.faults.longest_delay if slow else 0.002)
        self.busy = max(self.busy, world.now + took)
        world.at(self.busy, partial(self._arrive, message, self.dst.lifecycle))

    def _arrive(self, message: Any, target: int) -> None:
        if target == self.dst.lifecycle and self.dst.alive:
            self.dst.receive(message)
