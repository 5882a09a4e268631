"""One attempt of one request on the decode side, and its KV on the way in."""

from __future__ import annotations

from dataclasses import dataclass, field

from tetri.request import Capacity, Fingerprint, LengthRange, Receipt, Stage, blocks_for, difference
from tetri.wire.handover import BetweenWorkers, Chunk, Offer
from tetri.wire.messages import End

NEVER = 1 << 62


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


@dataclass(slots=True)
class DecodeRequest:
    """One attempt of one request on the decode side. `tokens` produced here, the adopted first token included; `sent`
    of them were told to the broker.

    What is predicted of it counts output tokens of all attempts together. It is looked at again when `tokens` are as
    many as `due`, and anything of it is to be done when they are as many as `mark`: nothing before."""

    key: str
    offer: Offer
    flow: KVInflow
    length: LengthRange | None = None  # moved up as tokens come, or replaced when more is known
    estimates: bool = False  # by its own hidden state here: nobody elsewhere knows more
    allocated: bool = False  # the engine has its blocks
    landed_as: int = 0  # place in the order of landing, 0: not all there
    running: bool = False
    tokens: list[int] = field(default_factory=list)
    sent: int = 0
    end: End | None = None
    recomputed: int = 0
    preempted: int = 0

    blocks: int = 0  # its account
    dispatch_end: int = 0  # predicted output tokens, by the end of the range that the dispatcher reckons with
    admit_end: int = 0  # the same by the one that admission reckons with
    heavy: bool = False
    growth: int = 0  # blocks that it is predicted to take in addition
    due: int = 0
    mark: int = 0

    @property
    def stage(self) -> Stage:
        if self.end:
            return Stage.DONE
        if self.running:
            return Stage.DECODE
        return Stage.WAITING if self.landed_as else Stage.MOVING

    def outputs(self) -> list[int]:
        return [*self.offer.output, *self.tokens]

    @property
    def written(self) -> int:
        """Output tokens, all attempts together."""
        return len(self.offer.output) + len(self.tokens)

    @property
    def size(self) -> int:
        """Tokens, prompt and output."""
        return len(self.offer.prompt) + len(self.offer.output) + len(self.tokens)

    def is_for(self, message: BetweenWorkers) -> bool:
        """Whether a message speaks of the very offer that this seat was granted for."""
        mine, other = self.offer, message
        return (mine.src, mine.incarnation, mine.rid, mine.attempt, mine.offer) == (
            other.src,
            other.incarnation,
            other.rid,
            other.attempt,
            other.offer,
        )

    def has_all_of(self, offer: Offer) -> bool:
        """Whether the KV of this very attempt has landed, for whichever offer."""
        same = (self.offer.attempt, self.offer.prompt, self.offer.output) == (offer.attempt, offer.prompt, offer.output)
        return bool(self.landed_as) and same

    def receipt(self, iid: str) -> Receipt:
        return Receipt(
            prompt_tokens=len(self.offer.prompt),
            adopted=len(self.offer.prompt),
            recomputed=self.recomputed,
            kv_bytes=self.flow.bytes,
            chunks=len(self.flow.landed),
            transport=self.flow.path,
            prefill_instance=self.offer.src,
            decode_instance=iid,
            preempted=self.preempted,
            refetched=self.flow.refetched,
        )


def obstacle(offer: Offer, fingerprint: Fingerprint, capacity: Capacity) -> str | None:
    """Why an engine can never take this offer, None when it may."""
    why = difference(fingerprint, offer.fingerprint)
    if why is not None:
        return why
    tokens, all_tokens = len(offer.prompt) + len(offer.output), len(offer.prompt) + offer.sampling.max_tokens
    if tokens == 0 or offer.blocks != blocks_for(tokens, capacity.block_tokens):
        return f"{tokens} tokens are not {offer.blocks} blocks"
    if tokens >= capacity.context or blocks_for(all_tokens, capacity.block_tokens) > capacity.blocks:
        return f"{all_tokens} tokens do not fit here"
    return None
