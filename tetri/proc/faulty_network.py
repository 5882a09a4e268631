"""Fault injection: a network that drops, duplicates, delays, reorders and replays the messages between workers."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec

from tetri.executor import Network
from tetri.faults import Chance, Faults
from tetri.kv.base import KVStore
from tetri.kv.faulty_store import FaultyStore, kill_myself
from tetri.proc.network import sooner
from tetri.wire.handover import BetweenWorkers
from tetri.wire.messages import Heartbeat

REMEMBERED = 512  # old messages that may be replayed
OVERTAKEN_S = 0.05  # a message held back for reordering is sent after this time at the latest

Poll = Callable[[float | None], Iterable[Any]]


class FaultyNetwork:
    """Injects faults into the messages between workers. Adds the counts of injected faults to the heartbeats."""

    def __init__(self, network: Network, chance: Chance, clock: Callable[[], float] = time.monotonic) -> None:
        self.network, self.chance, self.clock = network, chance, clock
        self.publish, self.connect, self.disconnect = network.publish, network.connect, network.disconnect
        self._old: deque[tuple[str, Any]] = deque(maxlen=REMEMBERED)
        self._late: list[tuple[float, str, Any]] = []
        # peer -> (latest time to send, message that the next one overtakes)
        self._overtaken: dict[str, tuple[float, Any]] = {}

    def send(self, peer: str, message: Any) -> None:
        """Send a message, perhaps with a fault."""
        if isinstance(message, Heartbeat):
            counters = {**message.counters, **self.chance.counters()}
            message = msgspec.structs.replace(message, counters=counters)
        if not isinstance(message, BetweenWorkers):
            self.network.send(peer, message)
            return
        chance = self.chance
        if self._old and chance.happens("replay"):
            self.network.send(*chance.rng.choice(self._old))
        self._old.append((peer, message))
        if chance.happens("drop"):
            return
        if chance.happens("delay"):
            self._late.append((self.clock() + chance.seconds(), peer, message))
            return
        if peer not in self._overtaken and chance.happens("reorder"):
            self._overtaken[peer] = (self.clock() + OVERTAKEN_S, message)
            return
        self.network.send(peer, message)
        if chance.happens("duplicate"):
            self.network.send(peer, message)
        _, waiting = self._overtaken.pop(peer, (0.0, None))
        if waiting is not None:
            self.network.send(peer, waiting)

    def due(self) -> float | None:
        """When `deliver` must be called, in seconds of the clock; None: no message is held back."""
        waits = [at for at, _, _ in self._late] + [until for until, _ in self._overtaken.values()]
        return min(waits, default=None)

    def deliver(self) -> None:
        """Send the messages whose delay is over."""
        now = self.clock()
        ready = [(peer, message) for at, peer, message in self._late if at <= now]
        self._late = [each for each in self._late if each[0] > now]
        ready += [(peer, message) for peer, (until, message) in self._overtaken.items() if until <= now]
        self._overtaken = {peer: each for peer, each in self._overtaken.items() if each[0] > now}
        for peer, message in ready:
            self.network.send(peer, message)

    def received(self, poll: Poll, timeout: float | None) -> Iterator[Any]:
        """Yield the events of `poll`, then `deliver`. Limits the timeout so that delayed messages leave in time."""
        yield from poll(sooner(timeout, self.due(), self.clock()))
        self.deliver()


def with_faults(
    faults: Faults, who: str, store: KVStore, network: Network, logger: logging.Logger
) -> tuple[FaultyStore, FaultyNetwork]:
    """Wrap store and network so that they inject `faults`. `who` (worker and incarnation) seeds the random choices."""
    chance = Chance(faults, who)
    logger.warning("FAULTS ARE INJECTED HERE (transfer.faults), this is a rehearsal: %s", faults)

    def die(moment: str) -> None:
        logger.critical("killing itself, as transfer.faults wants it: %s", moment)
        kill_myself(moment)

    return FaultyStore(store, chance, die), FaultyNetwork(network, chance)
