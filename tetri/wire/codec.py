"""Encodes and decodes messages: one byte of protocol version, then one MessagePack map. See docs/protocol.md.

Decoding is strict: bytes that are not exactly one message of the expected union raise a WireError, so a core never
gets a message that was understood in part.
"""

from __future__ import annotations

from functools import cache
from types import UnionType

import msgspec

from tetri.wire.bulk import HEADER_BYTES, REQUEST_BYTES, BulkReply, BulkRequest
from tetri.wire.clients import BrokerReply, ClientMessage, OperatorMessage
from tetri.wire.messages import ClusterView, InboxMessage, LoadReport, WorkerEvent

Messages = UnionType | type[msgspec.Struct]  # the messages of one socket: a union, or a single type
VERSION = 4
_VERSION_BYTE = bytes([VERSION])
MEGABYTE = 1 << 20
MAX_BYTES = 16 * MEGABYTE  # most bytes of any message
_LIMITS: dict[Messages, int] = {
    ClientMessage: 4 * MEGABYTE,
    OperatorMessage: 64 << 10,
    BrokerReply: MAX_BYTES,
    WorkerEvent: MAX_BYTES,
    InboxMessage: MAX_BYTES,
    LoadReport: 64 << 10,
    BulkRequest: REQUEST_BYTES,
    BulkReply: HEADER_BYTES,
    ClusterView: 4 * MEGABYTE,  # enough for about ten thousand instances
}
_MAX_REASON = 160  # characters; cut, because a reason quotes the message, which can have megabytes

_encoder = msgspec.msgpack.Encoder()
_decoder = cache(msgspec.msgpack.Decoder)  # by union


class WireError(ValueError):
    """Bytes that are no valid message, or a message that is too large to send. `kind` is the counter's name: empty,
    oversize, version, unreadable (no MessagePack) or unexpected (MessagePack, but no message of the union)."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def limit(union: Messages) -> int:
    """Most bytes of a message of this union, version byte included."""
    return _LIMITS.get(union, MAX_BYTES)


def encode(message: msgspec.Struct) -> bytes:
    """The frame of a message. Raises WireError if it is larger than MAX_BYTES."""
    data = b"".join((_VERSION_BYTE, _encoder.encode(message)))
    if len(data) > MAX_BYTES:
        raise WireError("oversize", f"{type(message).__name__} has {len(data)} bytes, at most {MAX_BYTES} are allowed")
    return data


def decode(data: bytes | memoryview, union: Messages) -> msgspec.Struct:
    """The message of `union` in a frame. Raises WireError with one short line that states what is wrong."""
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


def _short(error: Exception) -> str:
    line = "".join(char if char.isprintable() else "?" for char in str(error)[: _MAX_REASON + 1])
    return line if len(line) <= _MAX_REASON else line[: _MAX_REASON - 3] + "..."
