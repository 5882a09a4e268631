"""The deployment's key: one CURVE key pair, shared by all members; servers accept only clients that have it."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from dataclasses import dataclass, field

import zmq
from zmq.utils import z85

from tetri.net import sockets
from tetri.net.errors import NetError

_Z85_BYTES = 40
_MOST_WAITING = 64  # queued handshakes


@dataclass(frozen=True, slots=True)
class Key:
    """A CURVE key pair. Each key has 40 characters of Z85, the format of ZeroMQ."""

    public: bytes
    secret: bytes = field(repr=False)


def generate(path: str) -> None:
    """Create a new key file, readable only by its owner. Raises NetError when it exists or cannot be created."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise NetError(f"{path}: exists already, and a key is never overwritten: remove it or choose another") from None
    except OSError as error:
        raise NetError(f"{path}: cannot be made ({str(error.strerror).lower()})") from None
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, 0o600)  # independent of the umask
        file.write(zmq.curve_keypair()[1] + b"\n")


def load(path: str) -> Key:
    """Read a key file. Raises NetError when none is named, or it is missing, is not a key, or is readable by other
    users."""
    if not path:
        raise NetError("KV over TCP needs a key: make one with tetri-cli keygen, and set cluster.key")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        reason = str(error.strerror).lower()
        raise NetError(f"{path}: the key cannot be read ({reason}); make one with tetri-cli keygen") from None
    with os.fdopen(descriptor, "rb") as file:
        facts = os.fstat(descriptor)
        plain = stat.S_ISREG(facts.st_mode)
        if plain and facts.st_uid != os.geteuid():
            raise NetError(f"{path}: this key belongs to another user (uid {facts.st_uid}): make a copy of your own")
        if plain and facts.st_mode & 0o077:
            raise NetError(f"{path}: others can read this key: chmod 600 it")
        secret = file.read(_Z85_BYTES + 2).strip() if plain else b""
    if len(secret) == _Z85_BYTES:
        with suppress(ValueError, zmq.ZMQError):
            return Key(zmq.curve_public(secret), secret)
    raise NetError(f"{path}: is no key; make one with tetri-cli keygen")


def guard(socket: sockets.Socket, key: Key) -> None:
    """Make a socket accept only clients with `key`. Call it before bind, with a ZapHandler in the same context."""
    sockets.configure(socket, {zmq.CURVE_SERVER: 1, zmq.CURVE_SECRETKEY: key.secret, zmq.ZAP_DOMAIN: b"tetri"})
    socket.set(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without a ZAP handler all clients are refused


def introduce(socket: sockets.Socket, key: Key) -> None:
    """Make a socket use `key`, and require it of the server. Call it before connect."""
    own: sockets.Options = {zmq.CURVE_PUBLICKEY: key.public, zmq.CURVE_SECRETKEY: key.secret}
    sockets.configure(socket, {zmq.CURVE_SERVERKEY: key.public, **own})


class ZapHandler:
    """Authenticates clients (ZeroMQ's ZAP protocol): accepts those whose public key is the deployment's. The caller
    polls `socket` and calls `answer`. `refused` counts refused handshakes."""

    def __init__(self, context: sockets.Context, key: Key) -> None:
        self._key = z85.decode(key.public)
        self.refused = 0
        self.socket = context.socket(zmq.ROUTER)
        sockets.configure(self.socket, {zmq.LINGER: 0, zmq.RCVHWM: _MOST_WAITING, zmq.SNDHWM: _MOST_WAITING})
        self.socket.bind("inproc://zeromq.zap.01")

    def answer(self) -> None:
        """Answer all waiting handshakes."""
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            at = frames.index(b"") + 1 if b"" in frames else len(frames)
            envelope, ask = frames[:at], frames[at:]
            if len(ask) < 2:
                continue
            # version, request, domain, address, identity, mechanism, credentials
            known = len(ask) == 7 and ask[0] == b"1.0" and ask[5] == b"CURVE" and ask[6] == self._key
            self.refused += not known
            status = (b"200", b"OK") if known else (b"400", b"not a member of this deployment")
            with suppress(zmq.Again):
                self.socket.send_multipart([*envelope, b"1.0", ask[1], *status, b"", b""], zmq.NOBLOCK)

    def close(self) -> None:
        """Close the socket."""
        self.socket.close(0)
