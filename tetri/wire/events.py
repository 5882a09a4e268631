"""Network events as plain values, so that a core handles them without sockets."""

from __future__ import annotations

from dataclasses import dataclass

from msgspec import Struct


@dataclass(frozen=True, slots=True)
class Arrived:
    """A message arrived. `client`: a byte for the socket and the ZeroMQ identity of the client to answer; None for a
    message from an inbox."""

    message: Struct
    client: bytes | None = None


@dataclass(frozen=True, slots=True)
class PeerUp:
    """The connection to `peer` stands: messages sent from now on can arrive."""

    peer: str


@dataclass(frozen=True, slots=True)
class PeerDown:
    """The connection to `peer` broke; messages sent shortly before may be lost. The network layer reconnects by
    itself, and a PeerUp follows when the peer answers."""

    peer: str


NetEvent = Arrived | PeerUp | PeerDown
