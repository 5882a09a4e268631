"""Reading one socket: fairly, and without ever failing because of what somebody sent."""

from __future__ import annotations

import logging
from collections import Counter

import zmq

from tetri.net.sockets import Socket
from tetri.wire import codec
from tetri.wire.events import Arrived

# At most this much of one socket per poll, so that a flood on it does not keep the others waiting.
MAX_MESSAGES = 256
MAX_BYTES = 32 << 20
_MAX_COMPLAINTS = 256  # remembered (sender, kind) pairs: a sender can invent any number of identities


class Intake:
    """A PULL, a SUB (`identities` False) or a ROUTER (True) at `address`, and the messages that it may carry."""

    def __init__(
        self,
        socket: Socket,
        address: str,
        union: codec.Messages,
        identities: bool,
        counters: Counter[str],
        log: logging.Logger,
    ) -> None:
        self.socket = socket
        self.address = address
        self._union = union
        self._identities = identities
        self._counters = counters
        self._log = log
        self._complained: set[tuple[bytes | None, str]] = set()

    def read(self) -> list[Arrived]:
        """The messages that wait, up to the bounds above; garbage among them is counted and dropped."""
        arrived: list[Arrived] = []
        size = 0
        for _ in range(MAX_MESSAGES):
            frames = self._receive() if size < MAX_BYTES else None
            if frames is None:
                break
            size += sum(map(len, frames))
            event = self._decode(frames)
            if event is not None:
                arrived.append(event)
        self._counters["received_bytes"] += size
        self._counters["received"] += len(arrived)
        return arrived

    def _receive(self) -> list[bytes] | None:
        """One message's frames, of which no more are kept than needed to see that they are too many."""
        try:
            frames = [self.socket.recv(zmq.NOBLOCK)]
        except zmq.Again:
            return None
        while self.socket.get(zmq.RCVMORE):
            try:
                frame = self.socket.recv(zmq.NOBLOCK)
            except zmq.Again:  # a socket that keeps the newest part alone has lost the rest
                return [b""] * 3
            if len(frames) < 3:
                frames.append(frame)
        return frames

    def _decode(self, frames: list[bytes]) -> Arrived | None:
        client = frames[0] if self._identities else None
        body = frames[1:] if self._identities else frames
        if len(body) != 1:
            self._drop(client, "frames", "more than one frame" if body else "no frame after the identity")
            return None
        try:
            return Arrived(codec.decode(body[0], self._union), client)
        except codec.WireError as error:
            self._drop(client, error.kind, str(error))
            return None

    def _drop(self, client: bytes | None, kind: str, reason: str) -> None:
        self._counters[f"garbage_{kind}"] += 1
        if (client, kind) in self._complained or len(self._complained) >= _MAX_COMPLAINTS:
            return
        self._complained.add((client, kind))
        sender = f" from client {client.hex()}" if client is not None else ""
        self._log.warning("%s: dropped a message%s: %s", self.address, sender, reason)
