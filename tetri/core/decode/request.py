"""A request in its decode phase, and its KV on the way from the prefill instance."""

from __future__ import annotations

from dataclasses import dataclass, field

from tetri.instance import Capacity, Fingerprint, difference
from tetri.request import LengthRange, Receipt, Stage, Token, blocks_for
from tetri.wire.handover import BetweenWorkers, Chunk, Offer
from tetri.wire.messages import End

NEVER = 1 << 62


@dataclass(slots=True)
class KVInflow:
    """State of the KV receive of one request. `blocks`: of the whole prompt. `path`: over which its KV is read.
    `segment`: the sender's slab."""

    blocks: int
    path: str
    segment: str
    announced: dict[int, Chunk] = field(default_factory=dict)  # chunks not landed yet, by index
    landed: dict[int, int] = field(default_factory=dict)  # index -> number of blocks
    ranges: dict[int, tuple[int, int]] = field(default_factory=dict)  # index -> blocks [start, stop), landed or not
    tries: dict[int, int] = field(default_factory=dict)  # index -> fetches, of chunks fetched more than once
    broken: str | None = None  # why to refuse the offer, once no fetch is pending
    corrupt: bool = False  # the bytes can be read, and are wrong
    bytes: int = 0

    @property
    def complete(self) -> bool:
        """Whether all KV of the prompt has landed; the first tokens came with its last chunk."""
        return sum(self.landed.values()) == self.blocks

    @property
    def refetched(self) -> int:
        """How many fetches were repeated."""
        return sum(self.tries.values()) - len(self.tries)

    def obstacle(self, chunk: Chunk, choices: int) -> tuple[str, str] | None:
        """Return the counter and the reason why a new chunk cannot belong to this prompt, or None.

        A valid chunk lies in the sender's slab and within the prompt, overlaps no other chunk, has one slot per block,
        and carries the first tokens of as many `choices` exactly when it is the last chunk."""
        if chunk.handle.segment != self.segment:
            return "foreign", f"the chunk does not fit its offer: it lies in {chunk.handle.segment[:80]!r}"
        blocks = chunk.stop - chunk.start
        if len(chunk.handle.slots) < blocks:
            return "truncated", f"the chunk does not fit its offer: {blocks} blocks in {len(chunk.handle.slots)} slots"
        inside = 0 <= chunk.start < chunk.stop <= self.blocks and len(chunk.handle.slots) == blocks
        alone = all(chunk.stop <= start or stop <= chunk.start for start, stop in self.ranges.values())
        goes_on = bool(chunk.written) or chunk.tokens.count(None) < len(chunk.tokens)
        last = chunk.stop == self.blocks
        if inside and alone and goes_on == last and len(chunk.tokens) == (choices if last else 0):
            return None
        return "misfit", "the chunk does not fit its offer"

    def ends(self, offer: Offer, chunk: Chunk) -> bool:
        """Set how many blocks there are, from the last chunk of a decode that ran at the sender. Return whether it fits
        the tokens that come with it, and these the offer."""
        further = len(chunk.written) - len(offer.written) - 1  # whose KV comes too
        filled = len(offer.prompt) + len(offer.output) + len(chunk.written) - 1
        blocks = blocks_for(filled, offer.fingerprint.block_tokens)
        if offer.receipt is None or not 0 <= further <= offer.ahead or chunk.stop != blocks:
            return False
        self.blocks = blocks
        return True

    def announce(self, chunk: Chunk) -> None:
        """Add a chunk that the sender has announced."""
        self.announced[chunk.index] = chunk
        self.ranges[chunk.index] = (chunk.start, chunk.stop)

    def land(self, index: int) -> None:
        """Record that an announced chunk is in the engine's blocks."""
        chunk = self.announced.pop(index)
        self.landed[index] = chunk.stop - chunk.start
        self.bytes += len(chunk.handle.slots) * chunk.handle.block_bytes


@dataclass(slots=True, eq=False)
class DecodeRequest:
    """One attempt of one choice on the decode instance. `tokens`: the output tokens of this attempt, the first one,
    from the prefill instance, included. `sent`: how many of them the broker was sent. `offer`: its offer, as if it were
    alone in the hand-over; `place`: its place there.

    Predictions count the output tokens of all attempts. `due` and `mark` are numbers of `tokens`: at `due` the
    prediction or the account is updated; before `mark` there is nothing to update or send."""

    key: str
    offer: Offer
    flow: KVInflow
    place: int = 0
    length: LengthRange | None = None  # replaced when the output outgrows it or a better prediction arrives
    estimated: bool = False  # `length` is the estimate of its own hidden state here, the best there is
    allocated: bool = False  # the engine has allocated its blocks
    landed_as: int = 0  # place in the order of landing; 0: not all KV has landed
    running: bool = False
    tokens: list[Token] = field(default_factory=list)
    sent: int = 0
    end: End | None = None
    recomputed: int = 0
    preempted: int = 0
    void: int = 0  # of the attempts under which it was to go on elsewhere (Migrate.next), the last that counts no more
    shares: bool = False  # the KV that it uses counts as moved for another choice
    alone: bool = False  # its first tokens are computed in lone steps (Offer.alone)
    stays: bool = False  # the same engine prefills it: its KV does not move
    first_at: float = 0.0  # when its first token was known here, in seconds of this worker's clock

    blocks: int = 0  # size of its account in the ledger
    dispatch_end: int = 0  # predicted output tokens, by `rules.dispatch_end`
    admit_end: int = 0  # the same by `rules.admit_end`
    heavy: bool = False
    growth: int = 0  # blocks that it is predicted to need in addition
    due: int = 0
    mark: int = 0

    @property
    def stage(self) -> Stage:
        """The stage that a heartbeat reports."""
        if self.end:
            return Stage.DONE
        if self.running:
            return Stage.DECODE
        return Stage.WAITING if self.landed_as else Stage.MOVING

    def outputs(self) -> list[Token]:
        """Return the output tokens of all attempts."""
        return [*self.offer.output, *self.tokens]

    @property
    def written(self) -> int:
        """Number of output tokens of all attempts."""
        return len(self.offer.output) + len(self.tokens)

    @property
    def size(self) -> int:
        """Number of tokens, prompt and output together."""
        return len(self.offer.prompt) + len(self.offer.output) + len(self.tokens)

    def follows(self, offer: Offer) -> bool:
        """Return whether its offer is a later one than `offer`, of the same attempt by the same sender."""
        mine, other = self.offer, offer
        same = (mine.src, mine.incarnation, mine.attempt) == (other.src, other.incarnation, other.attempt)
        return same and mine.offer > other.offer

    def has_all_of(self, offer: Offer) -> bool:
        """Return whether all KV of the same attempt has landed, under whichever offer."""
        same = (self.offer.attempt, self.offer.prompt, self.offer.output) == (offer.attempt, offer.prompt, offer.output)
        return bool(self.landed_as) and same

    def receipt(self, iid: str) -> Receipt:
        """Return the receipt of the request on this instance `iid`. KV that several choices use counts as moved for
        one of them, so that sums over receipts are right."""
        flow, prompt = self.flow, len(self.offer.prompt)
        recomputed = min(self.recomputed, prompt)
        own = Receipt(
            prompt_tokens=prompt,
            local=prompt - recomputed if self.stays else 0,
            adopted=0 if self.stays else prompt - recomputed,
            recomputed=recomputed,
            kv_bytes=0 if self.shares else flow.bytes,
            chunks=0 if self.shares or self.stays else len(flow.landed),
            transport=flow.path,
            prefill_instance=self.offer.src,
            decode_instance=iid,
            preempted=self.preempted,
            refetched=0 if self.shares else flow.refetched,
        )
        return own if self.offer.receipt is None else own.after(self.offer.receipt)


@dataclass(slots=True, eq=False)
class HandOver:
    """An offer, and the KV that one transfer brings for all its choices. `requests`: those of them that are still here,
    by their place in the offer. Once all KV has `landed`, each goes on by itself. `ready`: the engine has allocated the
    blocks of all of them, so chunks can be fetched."""

    key: str
    offer: Offer
    flow: KVInflow
    requests: dict[int, DecodeRequest]
    tokens: list[Token | None] = field(default_factory=list)  # the first one of each choice, from the last chunk
    written: list[Token] = field(default_factory=list)  # or all tokens of one that ran at the sender
    ready: bool = False
    landed: bool = False

    @property
    def stays(self) -> bool:
        """Whether its KV is being computed in its place, by the prefill of the same engine."""
        return not self.landed and any(request.stays for request in self.requests.values())

    @property
    def lead(self) -> Offer:
        """The choice that stands for all: the first that is still here."""
        for request in self.requests.values():
            return request.offer
        return self.offer

    @property
    def blocks(self) -> int:
        """Blocks to reserve for all its choices."""
        return self.flow.blocks * len(self.requests)

    def engine_keys(self) -> tuple[str, ...]:
        """Return the keys of its requests."""
        return tuple([request.key for request in self.requests.values()])

    def is_for(self, message: BetweenWorkers) -> bool:
        """Return whether a message is about this very offer."""
        mine, other = self.offer, message
        same_sender = (mine.src, mine.incarnation) == (other.src, other.incarnation)
        return same_sender and (mine.rid, mine.attempt, mine.offer) == (other.rid, other.attempt, other.offer)


def key_of(message: BetweenWorkers) -> str:
    """Return the key of a hand-over, or of a request by its own offer."""
    return f"d:{message.rid}:{message.attempt}:{message.src}:{message.offer}"


def obstacle(offer: Offer, fingerprint: Fingerprint, capacity: Capacity) -> str | None:
    """Return why an engine of this `fingerprint` and `capacity` can never serve the offer, or None."""
    why = difference(fingerprint, offer.fingerprint)
    if why is not None:
        return why
    tokens, all_tokens = len(offer.tokens) + offer.ahead, len(offer.prompt) + offer.sampling.max_tokens
    if tokens == 0 or offer.blocks != blocks_for(tokens, capacity.block_tokens):
        return f"{tokens} tokens are not {offer.blocks} blocks"
    if tokens >= capacity.context or blocks_for(all_tokens, capacity.block_tokens) > capacity.blocks:
        return f"{all_tokens} tokens do not fit here"
    choices = 1 + len(offer.siblings)
    if choices * offer.blocks > capacity.blocks:
        return f"{choices} copies of {tokens} tokens do not fit here"
    return None
