"""The messages of the KV path `stream`: a KV receiver fetches blocks from the server of a sender's slab (protocol.md,
8b)."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from tetri.request import Count, Record
from tetri.wire.handover import Handle

PIECE_BYTES = 1 << 20  # most bytes of one piece's payload
# Least credit that a piece costs, however small: credit thereby also bounds the number of pieces in flight.
LEAST_COST = 64 << 10
MAX_SLOTS = 8192  # most slots in one Fetch
REQUEST_BYTES = 256 << 10  # most bytes of a frame to the server: a Fetch of MAX_SLOTS
HEADER_BYTES = 2 << 10  # most bytes of a Piece or Gone, without the payload

Reason = Annotated[str, Meta(max_length=300)]


class Fetch(Record, tag="fetch", frozen=True):
    """Requests the blocks in these slots, in order, from byte `start` on. The server serves fetches of one `lane` one
    after the other and alternates between lanes. `credit`: see Credit."""

    number: Count
    lane: Count
    handle: Handle
    start: Count
    credit: Count


class Credit(Record, tag="credit", frozen=True):
    """Allows the server to send pieces that cost `credit` bytes in total since the connection began. Never falls."""

    credit: Count


class Piece(Record, tag="piece", frozen=True):
    """Part of the answer to fetch `number`, from byte `start` on. The next frame is the payload."""

    number: Count
    start: Count


class Gone(Record, tag="gone", frozen=True):
    """The server sends nothing more for fetch `number`. `foreign`: the handle belongs to another slab."""

    number: Count
    foreign: bool
    reason: Reason


class Alive(Record, tag="alive", frozen=True):
    """Has no content. The server sends it to find out which receivers are still connected."""


BulkRequest = Fetch | Credit
BulkReply = Piece | Gone | Alive


def cost(size: int) -> int:
    """Credit, in bytes, that a piece of `size` bytes costs."""
    return max(size, LEAST_COST)
