"""What a process hears from the network, as values: a core handles them without knowing any socket."""

from __future__ import annotations

from dataclasses import dataclass

from msgspec import Struct


@dataclass(frozen=True, slots=True)
class Arrived:
    """A message was read. `client` is whom to answer; None when it came over an inbox."""

    message: Struct
    client: bytes | None = None


@dataclass(frozen=True, slots=True)
class PeerUp:
    """The connection to `peer` stands: what is sent from now on can arrive."""

    peer: str


@dataclass(frozen=True, slots=True)
class PeerDown:
    """The connection to `peer` broke; what was sent lately may be lost. It is tried again by itself, and a
    PeerUp follows when somebody answers."""

    peer: str


NetEvent = Arrived | PeerUp | PeerDown
