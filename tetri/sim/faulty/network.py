"""Processes that can be killed and frozen, and their connections, with faults."""

from __future__ import annotations

from collections import deque
from math import inf
from typing import Any

from msgspec.structs import replace

from tetri.sim.faulty.chance import Chance
from tetri.sim.links import Port, Wiring
from tetri.sim.nodes import Node
from tetri.wire.codec import decode, encode
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.handover import BetweenWorkers, Chunk
from tetri.wire.messages import InboxMessage

REMEMBERED = 40  # recent messages between two workers, which a replay draws from
NOTICED_S = 0.03  # within this time a process notices that a peer is dead
CONNECTED_S = 0.02  # within this time a connection is up
OVERTAKEN_S = 0.02  # within this time an overtaking message arrives
REPLAYED_S = 0.05  # within this time after a message a replayed one arrives


class Process(Node):
    """One incarnation of a process. After `kill` it receives nothing; while `frozen`, events wait in its inbox."""

    reads: Any = InboxMessage  # the type of the messages that it receives
    port: FaultyPort
    alive = True
    frozen = False
    _stopped_at = 0.0

    def receive(self, event: Any) -> None:
        if self.alive:
            super().receive(event)

    def turn(self) -> None:
        """Run one turn of the loop, unless the process is dead or frozen."""
        if self.alive and not self.frozen:
            super().turn()

    def wake(self) -> None:
        """Schedule a turn: KV has arrived, or slots are free."""
        if not self._turn_set:
            self._turn_set = True
            self.kernel.at(self.kernel.now, self._turn)

    def kill(self, chance: Chance) -> None:
        """Kill the process as `kill -9` does: its state is lost, and its messages in transit may be."""
        chance.note(self.name, "killed")
        self.alive = False
        self.port.close()
        for line in self.port.wiring.connections():
            if line.address == self.name:
                chance.after(NOTICED_S, line.break_off)

    def freeze(self, chance: Chance) -> None:
        """Stop the process for a while."""
        chance.note(self.name, "is frozen")
        self.stop()
        chance.recovers(self.go_on)

    def stop(self) -> None:
        """Stop the process as SIGSTOP does; its clock stops too."""
        self.frozen, self._stopped_at = True, self.kernel.now

    def go_on(self, _: Any = None) -> None:
        """Let it go on as SIGCONT does."""
        self.frozen = False
        self.lag_s += self.kernel.now - self._stopped_at
        self._turn(None)


class FaultyWiring(Wiring):
    """All current processes; a restarted process replaces the dead one of its name. Published messages reach each
    subscriber in order or not at all."""

    processes: dict[str, Process]  # type: ignore[assignment]  # every receiver is a Process

    def __init__(self, chance: Chance, latency_s: float, whole: bool) -> None:
        super().__init__(chance.kernel, latency_s, whole)
        self.chance = chance
        self.segments: dict[str, None] = {}  # names of all KV slabs ever created, in order
        self.recent: dict[tuple[str, str], deque[Any]] = {}  # recent messages by (sender, receiver)
        self._busy: dict[tuple[str, str], float] = {}  # when the last message to a subscriber arrives

    def connections(self) -> list[Connection]:
        """Return the connections of all processes."""
        return [line for process in self.processes.values() for line in process.port.lines()]

    def publish(self, who: str, message: Any) -> None:
        """Send a message to all subscribers of the process `who`; each copy may be lost or late."""
        message, chance, kernel = decode(encode(message), type(message)), self.chance, self.kernel
        for subscriber in self.subscribers.get(who, ()):
            if chance.happens("drop"):
                continue
            self.sent += 1
            key = (who, subscriber.name)
            arrives = self._busy[key] = max(self._busy.get(key, -inf), kernel.now + chance.way_s(self.latency_s))
            kernel.at(arrives, subscriber.receive, message)

    def replace(self, process: Process) -> None:
        """Replace the dead process of the same name."""
        dead, self.processes[process.name] = self.processes[process.name], process
        for subscribers in self.subscribers.values():
            subscribers[:] = [process if each is dead else each for each in subscribers]
        for line in self.connections():
            if line.address == process.name:
                line.break_off()  # if the peer has not noticed yet
                line.connect()


class Connection:
    """One direction of a connection, from `src` to the peer `name`; messages stay in order. A break loses the messages
    in transit."""

    def __init__(self, wiring: FaultyWiring, src: Process, name: str, address: str) -> None:
        self.wiring, self.chance, self.src = wiring, wiring.chance, src
        self.name, self.address = name, address
        self.to = wiring.processes[address]  # the peer process of this connection
        self.up, self.closed = False, False
        self.number = 0  # incremented when the connection breaks, to recognise messages in transit
        self._busy = -inf  # when the last message arrives

    def receive(self, message: Any) -> None:
        """Take a message of `src` and schedule its arrival, with faults."""
        chance, kernel = self.chance, self.wiring.kernel
        if chance.happens("drop"):
            return
        message = decode(encode(message), self.to.reads)
        if isinstance(message, BetweenWorkers):
            message = self._confused(message)
        for _ in range(2 if chance.happens("duplicate") else 1):
            self._busy = max(self._busy, kernel.now + chance.way_s(self.wiring.latency_s))
            kernel.at(self._busy, self._arrive, (message, self.number, self.to))

    def _confused(self, message: BetweenWorkers) -> BetweenWorkers:
        """Apply faults that only a broken sender causes: replay, overtake and mangle."""
        chance, this = self.chance, (self.number, self.to)
        old = self.wiring.recent.setdefault((self.src.name, self.to.name), deque(maxlen=REMEMBERED))
        if old and chance.happens("replay"):
            chance.after(REPLAYED_S, self._arrive, (chance.rng.choice(old), *this))
        old.append(message)
        if chance.happens("overtake"):
            chance.after(OVERTAKEN_S, self._arrive, (message, *this))
        return self._mangled(message) if isinstance(message, Chunk) and chance.happens("mangle") else message

    def _mangled(self, chunk: Chunk) -> Chunk:
        handle, rng = chunk.handle, self.chance.rng
        match rng.randrange(3):
            case 0:
                return replace(chunk, tokens=[] if chunk.tokens else [5])
            case 1:
                return replace(chunk, handle=replace(handle, segment=rng.choice([*self.wiring.segments])))
        return replace(chunk, handle=replace(handle, slots=handle.slots[1:], generations=handle.generations[1:]))

    def _arrive(self, sent: tuple[Any, int, Process]) -> None:
        message, number, to = sent
        if number == self.number and to is self.to:
            to.receive(message)

    def connect(self) -> None:
        """Bring the connection up after a while, if both processes live then."""
        self.chance.after(CONNECTED_S, self._connected)

    def _connected(self, _: Any) -> None:
        to = self.wiring.processes[self.address]
        if not self.closed and not self.up and self.src.alive and to.alive:
            self.up, self.to = True, to
            self.src.port.set_up(self)
            self.src.receive(PeerUp(self.name))

    def break_off(self, _: Any = None) -> None:
        """Break the connection, let `src` notice it, and connect again."""
        if self.up:
            self.up = False
            self.number += 1
            self.src.port.set_down(self)
            self.src.receive(PeerDown(self.name))
            self.connect()

    def close(self) -> None:
        """Close the connection; by chance messages in transit are lost."""
        self.closed, self.up = True, False
        if not self.chance.over and self.chance.rng.random() < 0.5:
            self.number += 1


class FaultyPort(Port):
    """The connections of one incarnation of a process."""

    wiring: FaultyWiring

    def __init__(self, wiring: FaultyWiring, name: str) -> None:
        super().__init__(wiring, name)
        self.process: Process | None = None
        self._lines: dict[str, Connection] = {}

    def lines(self) -> list[Connection]:
        """Return all connections, up or not."""
        return [*self._lines.values()]

    def _send(self, to: Any, message: Any) -> None:
        self.wiring.sent += 1
        to.receive(message)  # a Connection

    def connect(self, peer: str, address: str) -> None:
        if peer not in self._lines:
            assert self.process is not None
            line = self._lines[peer] = Connection(self.wiring, self.process, peer, address)
            line.connect()

    def set_up(self, line: Connection) -> None:
        """Note that a connection is up."""
        self._up[line.name] = line

    def set_down(self, line: Connection) -> None:
        """Note that a connection is down."""
        self._up.pop(line.name, None)

    def disconnect(self, peer: str) -> None:
        self._up.pop(peer, None)
        line = self._lines.pop(peer, None)
        if line is not None:
            line.close()

    def close(self) -> None:
        for peer in [*self._lines]:
            self.disconnect(peer)
