"""Simulated links: messages arrive after a latency, KV bytes after their transfer time."""

from __future__ import annotations

from typing import Any, Protocol

from tetri.core.actions import Adopt, Adopted, Export, Exported, Freed
from tetri.instance import Reach
from tetri.kv.limit import LimitedLink
from tetri.sim.kernel import Kernel
from tetri.wire.events import PeerUp
from tetri.wire.handover import Chunk, Drop, Handle


class Receiver(Protocol):
    """A process as its peers see it."""

    name: str

    def receive(self, event: Any) -> None:
        """Take one event or message."""
        ...


class Wiring:
    """All processes and subscribers, by name. A message takes `latency_s` seconds. With `whole`, the KV of a request is
    sent when its prefill is done, as in the paper (section 3.3.4); otherwise chunk by chunk. `sent` counts messages."""

    def __init__(self, kernel: Kernel, latency_s: float, whole: bool = False) -> None:
        self.kernel, self.latency_s, self.whole = kernel, latency_s, whole
        self.processes: dict[str, Receiver] = {}
        self.subscribers: dict[str, list[Receiver]] = {}
        self.sent = 0

    def publish(self, who: str, message: Any) -> None:
        """Send a message to all subscribers of the process `who`."""
        self.kernel.at(self.kernel.now + self.latency_s, self._spread, (who, message))

    def _spread(self, published: tuple[str, Any]) -> None:
        who, message = published
        subscribers = self.subscribers.get(who, ())
        self.sent += len(subscribers)
        for subscriber in subscribers:
            subscriber.receive(message)


class Port:
    """The connections of one process, by name of the peer."""

    def __init__(self, wiring: Wiring, name: str) -> None:
        self.wiring, self.name = wiring, name
        self._peers: dict[str, Receiver] = {}
        self._up: dict[str, Receiver] = {}
        self._kept: dict[
            tuple[str, str, int, int], dict[int, Chunk]
        ] = {}  # chunks held back until the last one of their request

    def send(self, peer: str, message: Any) -> None:
        """Send a message to a peer. It is lost if the connection is not up."""
        to = self._up.get(peer)
        if to is None:
            return
        if self.wiring.whole and isinstance(message, Chunk | Drop):
            self._send_whole(to, message)
        else:
            self._send(to, message)

    def _send(self, to: Receiver, message: Any) -> None:
        wiring = self.wiring
        wiring.sent += 1
        wiring.kernel.at(wiring.kernel.now + wiring.latency_s, to.receive, message)

    def _send_whole(self, to: Receiver, message: Chunk | Drop) -> None:
        key = (to.name, message.rid, message.attempt, message.offer)
        if isinstance(message, Drop):
            self._kept.pop(key, None)
            self._send(to, message)
            return
        kept = self._kept.setdefault(key, {})
        kept[message.index] = message
        if message.tokens:
            for chunk in self._kept.pop(key).values():
                self._send(to, chunk)

    def publish(self, message: Any) -> None:
        """Send a message to all subscribers of this process."""
        self.wiring.publish(self.name, message)

    def connect(self, peer: str, address: str) -> None:
        """Connect to a peer after the latency. In the simulator a process's address is its name."""
        if peer not in self._peers:
            self._peers[peer] = self.wiring.processes[address]
            self.wiring.kernel.at(self.wiring.kernel.now + self.wiring.latency_s, self._connected, peer)

    def _connected(self, peer: str) -> None:
        if peer in self._peers and peer not in self._up:
            self._up[peer] = self._peers[peer]
            self.wiring.processes[self.name].receive(PeerUp(peer))

    def disconnect(self, peer: str) -> None:
        """Close the connection to a peer, if there is one."""
        self._peers.pop(peer, None)
        self._up.pop(peer, None)


class SimulatedKV:
    """The KV store of one instance, without real bytes, and its incoming link. The link carries one transfer at a
    time at `bytes_s` bytes per second, like the emulated link of a live worker. Local transfers take no time."""

    def __init__(self, kernel: Kernel, owner: Receiver, block_bytes: int, bytes_s: float) -> None:
        self.kernel, self.owner, self.block_bytes, self.link = kernel, owner, block_bytes, LimitedLink(bytes_s)
        self.kept = 0  # blocks in the store
        self.moved_bytes = 0  # received from other instances

    def export(self, action: Export) -> Exported:
        count = action.stop - action.start
        self.kept += count
        zeros = [0] * count
        handle = Handle(segment=self.owner.name, slots=zeros, generations=zeros, block_bytes=self.block_bytes)
        return Exported(action.key, action.index, action.start, action.stop, handle, 0)

    def free(self, handle: Handle) -> Freed:
        self.kept -= len(handle.slots)
        return Freed(len(handle.slots))

    def meet(self, peer: str, reach: Reach) -> None:
        """Do nothing: there is no connection to open."""

    def part(self, peer: str) -> None:
        """Do nothing: there is no connection to close."""

    def adopt(self, action: Adopt) -> Adopted | None:
        done = Adopted(action.key, action.index)
        if action.handle.segment == self.owner.name:
            return done
        size = len(action.handle.slots) * self.block_bytes
        self.moved_bytes += size
        at = self.link.arrival(size, self.kernel.now)
        if at <= self.kernel.now:
            return done
        self.kernel.at(at, self.owner.receive, done)
        return None
