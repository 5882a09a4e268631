"""Reads the messages of one socket, with a limit per poll. Invalid messages are counted and dropped, never raised."""

from __future__ import annotations

from collections import Counter
from logging import Logger

import zmq

from tetri.net.sockets import Socket
from tetri.wire import codec
from tetri.wire.codec import Messages
from tetri.wire.events import Arrived

# Limits per socket and poll, so that a flood on one socket does not starve the others.
MAX_MESSAGES = 256
MAX_BYTES = 32 << 20
MAX_CLIENT_BYTES = 1 << 20  # a Submit of 2 MB with many turns takes up to 0.1 s to decode: streams go on between two
_MAX_COMPLAINTS = 256  # (sender, kind) pairs to log; limited, because a sender can invent identities


class Intake:
    """Reads a socket at `address`. `union`: the valid messages. `router`: None for a PULL or SUB; for a ROUTER, the
    byte that tells it from the other ROUTERs of the process, whose clients may have the same identities. It comes
    before the identity in `Arrived.client`. `more`: the last `read` ended at a limit, so messages may still wait."""

    def __init__(
        self, socket: Socket, address: str, union: Messages, router: bytes | None, counters: Counter[str], log: Logger
    ) -> None:
        self.socket, self.address = socket, address
        self._union, self._router, self._counters, self._log = union, router, counters, log
        self.more = False
        self._complained: set[tuple[bytes | None, str]] = set()

    def read(self) -> list[Arrived]:
        """The waiting messages, up to the limits above. Counts and drops invalid ones."""
        arrived: list[Arrived] = []
        count = size = 0
        most = MAX_BYTES if self._router is None else MAX_CLIENT_BYTES
        self.more = True
        while count < MAX_MESSAGES and size < most:
            frames = self._receive()
            if frames is None:
                self.more = False
                break
            count += 1
            size += sum(map(len, frames))
            event = self._decode(frames)
            if event is not None:
                arrived.append(event)
        self._counters["received_bytes"] += size
        self._counters["received"] += len(arrived)
        return arrived

    def _receive(self) -> list[bytes] | None:
        """The frames of one message, at most three: that many are always invalid. None when no message waits."""
        try:
            frames = [self.socket.recv(zmq.NOBLOCK)]
        except zmq.Again:
            return None
        while self.socket.get(zmq.RCVMORE):
            try:
                frame = self.socket.recv(zmq.NOBLOCK)
            except zmq.Again:  # a CONFLATE socket keeps only one frame, so the rest is lost
                return [b""] * 3
            if len(frames) < 3:
                frames.append(frame)
        return frames

    def _decode(self, frames: list[bytes]) -> Arrived | None:
        client = None if self._router is None else self._router + frames[0]
        body = frames if self._router is None else frames[1:]
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
