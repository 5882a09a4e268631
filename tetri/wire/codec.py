"""Bytes on the wire: one byte of protocol version, then one MessagePack map. See docs/protocol.md.

Reading is strict. Whatever is not exactly a message of the expected union is a WireError, so that nothing
half-understood reaches a core.
"""

from __future__ import annotations

from functools import cache
from types import UnionType
from typing import Any

import msgspec

from tetri.wire.bulk import HEADER_BYTES, REQUEST_BYTES, BulkReply, BulkRequest
from tetri.wire.clients import BrokerReply, ClientMessage
from tetri.wire.messages import ClusterView, InboxMessage, LoadReport, WorkerEvent

Messages = UnionType | type[msgspec.Struct]  # what a socket carries: a union of messages, or one of them alone
VERSION = 2
_VERSION_BYTE = bytes([VERSION])
MEGABYTE = 1 << 20
MAX_BYTES = 16 * MEGABYTE  # of any message
_LIMITS: dict[Messages, int] = {
    ClientMessage: 4 * MEGABYTE,
    BrokerReply: MAX_BYTES,
    WorkerEvent: MAX_BYTES,
    InboxMessage: MAX_BYTES,
    LoadReport: 64 << 10,
    BulkRequest: REQUEST_BYTES,
    BulkReply: HEADER_BYTES,
    ClusterView: 4 * MEGABYTE,  # some ten thousand instances
}
_MAX_REASON = 160  # characters: a reason quotes what was sent, and that may be megabytes

_encoder = msgspec.msgpack.Encoder()


class WireError(ValueError):
    """Bytes that are no message, or a message that may not be sent. `kind` is one word to count by: empty,
    oversize, version, unreadable (no MessagePack), unexpected (MessagePack, but not one of the messages)."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def limit(union: Messages) -> int:
    """The most bytes that a message of this union may have, version byte included."""
    return _LIMITS.get(union, MAX_BYTES)


def encode(message: msgspec.Struct) -> bytes:
    """A message as it goes into one frame. Raises WireError when no receiver would take it for its size."""
    data = b"".join((_VERSION_BYTE, _encoder.encode(message)))
    if len(data) > MAX_BYTES:
        raise WireError("oversize", f"{type(message).__name__} has {len(data)} bytes, at most {MAX_BYTES} are allowed")
    return data


def decode(data: bytes | memoryview, union: Messages) -> msgspec.Struct:
    """The message of `union` in one frame. Raises WireError with one short line that says what is wrong."""
    if len(data) == 0:
        raise WireError("empty", "empty frame")
    if len(data) > limit(union):
        raise WireError("oversize", f"{len(data)} bytes, at most {limit(union)} are allowed")
    if data[0] != VERSION:
        raise WireError("version", f"protocol version {data[0]}, expected {VERSION}")
    try:
        message: msgspec.Struct = _decoder(union).decode(memoryview(data)[1:])
        return message
    except msgspec.ValidationError as error:
        raise WireError("unexpected", _short(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError("unreadable", _short(error)) from None


@cache
def _decoder(union: Messages) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(union)


def _short(error: Exception) -> str:
    line = "".join(char if char.isprintable() else "?" for char in str(error)[: _MAX_REASON + 1])
    return line if len(line) <= _MAX_REASON else line[: _MAX_REASON - 3] + "..."
