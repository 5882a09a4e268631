"""The messages of the KV path `stream`, between a receiver and the server of a sender's slab (protocol.md, 8b)."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from tetri.request import Count, Record
from tetri.wire.handover import Handle

PIECE_BYTES = 1 << 20  # of one piece's payload, at most
# A piece costs its bytes of credit, but never less than this: so credit bounds how many pieces are under way, too.
LEAST_COST = 64 << 10
MAX_SLOTS = 8192  # in one Fetch
REQUEST_BYTES = 256 << 10  # a frame to the server, at most: a Fetch of MAX_SLOTS
HEADER_BYTES = 2 << 10  # a Piece, or a Gone, without the payload

Reason = Annotated[str, Meta(max_length=300)]


class Fetch(Record, tag="fetch", frozen=True):
    """Send me these slots, from byte `start` of their blocks in order. Fetches of one `lane` are served one after the
    other, lanes take turns. `credit`: see Credit."""

    number: Count
    lane: Count
    handle: Handle
    start: Count
    credit: Count


class Credit(Record, tag="credit", frozen=True):
    """Since the beginning of this connection, pieces that cost `credit` bytes in all may be sent. Never less than
    before."""

    credit: Count


class Piece(Record, tag="piece", frozen=True):
    """The payload is the next frame: what `number` asked for, from byte `start` on."""

    number: Count
    start: Count


class Gone(Record, tag="gone", frozen=True):
    """Nothing more comes for `number`. `foreign`: the handle is not of this slab at all."""

    number: Count
    foreign: bool
    reason: Reason


class Alive(Record, tag="alive", frozen=True):
    """Says nothing: the server finds out by it who is still connected."""


BulkRequest = Fetch | Credit
BulkReply = Piece | Gone | Alive


def cost(size: int) -> int:
    """Credit that a piece of `size` bytes takes."""
    return max(size, LEAST_COST)
