"""Adapts a hub to the actions and events of a core."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from msgspec.structs import replace

from tetri import log
from tetri.executor import Copies
from tetri.kv.unnamed import UNLINKED
from tetri.net.errors import NetError
from tetri.net.hub import Hub
from tetri.wire.codec import WireError
from tetri.wire.events import Arrived
from tetri.wire.messages import Heartbeat

# Longest time in which a worker reads between two steps; the decodes of a mixed instance wait meanwhile. An Assign of
# 300 tokens takes some 30 us and one of 2,000 some 150 us, so thousands of them take one or two steps.
READ_S = 0.4


class HubNetwork:
    """Sends messages without a guarantee and without raising: heartbeats and timers repair a lost message."""

    def __init__(
        self, hub: Hub, logger: logging.Logger, kv: Callable[[], Mapping[str, int]] = lambda: MappingProxyType({})
    ) -> None:
        """`kv` returns the counters of the KV paths of a worker."""
        self.hub, self.log, self.kv = hub, logger, kv
        self.disconnect = hub.disconnect
        self._unlinked_logged = False  # that the segment was removed

    def send(self, peer: str, message: Any) -> None:
        """Send to one peer. A Heartbeat gets the counters of what this process could not send or read."""
        if isinstance(message, Heartbeat):
            own = self.counters()
            if UNLINKED in own and not self._unlinked_logged:
                self._unlinked_logged = True
                self.log.error("%s: tetri-cli doctor says what to do", UNLINKED)
            message = replace(message, counters={**message.counters, **own})
        try:
            self.hub.send(peer, message)
        except WireError as error:
            self.log.error("%s %s", error, log.fields(iid=peer))

    def counters(self) -> dict[str, int]:
        """The messages that could not be sent, by reason and peer, those that could not be read, by kind, and the
        events on KV paths."""
        unsent = {f"unsent_{name}": count for name, count in self.hub.unsent.items()}
        invalid = {name: count for name, count in self.hub.counters.items() if name.startswith("garbage_")}
        return {**unsent, **invalid, **self.kv()}

    def publish(self, message: Any) -> None:
        """Send to all subscribers."""
        try:
            self.hub.publish(message)
        except WireError as error:
            self.log.error("%s", error)

    def connect(self, peer: str, address: str) -> None:
        """Connect to a peer's inbox; a wrong address is logged."""
        try:
            self.hub.connect(peer, address)
        except NetError as error:  # the peer sent a wrong address: it stays unreachable, and the status shows it
            self.log.error("%s %s", error, log.fields(iid=peer))


def polled(hub: Hub, timeout: float | None) -> Iterator[Any]:
    """Yield the events of the hub as inputs of a core without clients."""
    for event in hub.poll(timeout):
        yield event.message if isinstance(event, Arrived) else event


def drained(
    hub: Hub, timeout: float | None, clock: Callable[[], float] = time.monotonic, most_s: float = READ_S
) -> Iterator[Any]:
    """Yield the events of the hub until it has no more, for about `most_s` seconds at most. One poll reads a limited
    number of messages, and a worker polls once a step: a Close behind thousands of Assigns would wait for as many
    steps."""
    yield from polled(hub, timeout)
    until = clock() + most_s
    while hub.more and clock() < until:
        yield from polled(hub, 0.0)


def sooner(timeout: float | None, due: float | None, now: float) -> float | None:
    """The timeout, shortened so that it ends at `due`. All in seconds; None: without limit."""
    left = None if due is None else max(0.0, due - now)
    return left if timeout is None else timeout if left is None else min(timeout, left)


def received(
    hub: Hub, copies: Copies, others: Sequence[Callable[[], Iterator[Any]]], timeout: float | None
) -> Iterator[Any]:
    """Yield the inputs of a worker's core: messages, KV, then the events of `others`. Each source wakes the hub."""
    yield from drained(hub, sooner(timeout, copies.due(), time.monotonic()))
    yield from copies.events()
    for other in others:
        yield from other()
