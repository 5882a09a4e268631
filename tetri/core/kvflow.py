"""KV on its way: the chunks of one attempt, seen from the sender (`KVOutflow`) and from the receiver (`KVInflow`).

offered -> granted -> every chunk announced and landed. The sender announces without waiting for the Grant and
keeps a chunk until its Landed; after a Refuse the same slots are offered elsewhere, unless a chunk was freed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tetri.wire.handover import Chunk, Handle


@dataclass(slots=True)
class KVChunk:
    """One chunk in the sender's store: blocks [start, stop), one slot each."""

    index: int
    start: int
    stop: int
    handle: Handle
    digest: int | None
    token: int | None


@dataclass(slots=True)
class KVOutflow:
    """The sender's side. `offer` numbers the current try, None while nobody is asked."""

    blocks: int  # of the whole prompt
    offer: int | None = None
    target: str = ""
    granted: bool = False
    grant_lost: bool = False  # it was granted once, but is no more
    in_flight: dict[int, KVChunk] = field(default_factory=dict)  # put and not landed, by index
    landed: int = 0  # blocks landed, and so freed here
    exported: int = 0  # blocks put, landed ones included
    chunks: int = 0  # chunks put, the next index
    awaited: dict[int, tuple[int, int]] = field(default_factory=dict)  # index -> blocks that are being put
    sent: list[KVChunk] = field(default_factory=list)  # all that were put, landed ones included

    @property
    def complete(self) -> bool:
        return self.landed == self.blocks

    @property
    def kept(self) -> int:
        """Blocks in the sender's store, or on their way into it."""
        return self.exported - self.landed

    @property
    def movable(self) -> bool:
        """Whether another decode instance can still be asked."""
        return self.landed == 0

    def put(self, kv_chunk: KVChunk) -> None:
        self.in_flight[kv_chunk.index] = kv_chunk
        self.sent.append(kv_chunk)

    def land(self, index: int) -> Handle | None:
        """The receiver has this chunk; its handle is returned once, to be freed."""
        self.grant()  # or nothing could land: asking anew could be granted anew, without what landed
        kv_chunk = self.in_flight.pop(index, None)
        if kv_chunk is None:
            return None
        self.landed += kv_chunk.stop - kv_chunk.start
        return kv_chunk.handle

    def grant(self) -> None:
        self.granted, self.grant_lost = True, False

    def aim(self, offer: int, target: str) -> None:
        self.offer, self.target, self.granted = offer, target, False

    def clear_aim(self) -> None:
        self.grant_lost = self.grant_lost or self.granted
        self.offer, self.target, self.granted = None, "", False

    def drain(self) -> list[Handle]:
        """Give everything up: the handles to free."""
        handles = [kv_chunk.handle for kv_chunk in self.in_flight.values()]
        self.in_flight.clear()
        return handles


@dataclass(slots=True)
class KVInflow:
    """The receiver's side: which chunks are announced, which are in own memory. `path`: how they come; `segment`: the
    sender's slab."""

    blocks: int
    path: str
    segment: str
    announced: dict[int, Chunk] = field(default_factory=dict)  # not landed yet
    landed: dict[int, int] = field(default_factory=dict)  # index -> blocks
    ranges: dict[int, tuple[int, int]] = field(default_factory=dict)  # index -> blocks [start, stop), both kinds
    tries: dict[int, int] = field(default_factory=dict)  # of chunks that were taken more than once: how often
    broken: str | None = None  # why the offer is refused as soon as nothing more is on its way
    corrupt: bool = False  # and nobody else need be asked
    bytes: int = 0
    token: int | None = None

    @property
    def complete(self) -> bool:
        return self.token is not None and sum(self.landed.values()) == self.blocks

    @property
    def refetched(self) -> int:
        """How often a chunk was taken again."""
        return sum(self.tries.values()) - len(self.tries)

    def obstacle(self, chunk: Chunk) -> tuple[str, str] | None:
        """Why a new chunk cannot be one of this prompt's, in a word and in a line: it is of the sender's slab, within
        the prompt, over no other chunk, a slot a block, and with the first token exactly when it is the last."""
        if chunk.handle.segment != self.segment:
            return "foreign", f"the chunk does not fit its offer: it lies in {chunk.handle.segment[:80]!r}"
        spread = chunk.stop - chunk.start
        if len(chunk.handle.slots) < spread:
            return "truncated", f"the chunk does not fit its offer: {spread} blocks in {len(chunk.handle.slots)} slots"
        inside = 0 <= chunk.start < chunk.stop <= self.blocks and len(chunk.handle.slots) == spread
        alone = all(chunk.stop <= start or stop <= chunk.start for start, stop in self.ranges.values())
        if inside and alone and (chunk.token is not None) == (chunk.stop == self.blocks):
            return None
        return "misfit", "the chunk does not fit its offer"

    def announce(self, chunk: Chunk) -> None:
        if chunk.token is not None:
            self.token = chunk.token
        self.announced[chunk.index] = chunk
        self.ranges[chunk.index] = (chunk.start, chunk.stop)

    def land(self, index: int) -> None:
        chunk = self.announced.pop(index)
        self.landed[index] = chunk.stop - chunk.start
        self.bytes += len(chunk.handle.slots) * chunk.handle.block_bytes
