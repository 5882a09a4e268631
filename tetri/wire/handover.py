"""The messages of the KV hand-over between two workers. messages.py has those of the broker and the monitor."""

from __future__ import annotations

from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from tetri.instance import Fingerprint
from tetri.request import Count, LengthRange, Name, Receipt, Record, Sampling, Token


class BetweenWorkers(Record, frozen=True):
    """Base of the messages between workers. `src` and `incarnation` identify the sender of the message; `rid`,
    `attempt` and `offer` identify the hand-over."""

    src: Name
    incarnation: int
    rid: Name
    attempt: Count
    offer: Count


class Sibling(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A further choice that shares the prefill and the transfer of KV of another one. `rid`: its id; `seed`: that of
    its Sampling, which is equal otherwise."""

    rid: Name
    attempt: Count
    seed: Count


class Handle(Record, frozen=True):
    """Where the KV blocks of a KV chunk are: block i is in slot `slots[i]` of `segment`. `generations[i]` is the
    generation of the slot, which changes when the slot is reused. `block_bytes`: size of one block."""

    segment: str
    slots: list[Count]
    generations: list[Count]
    block_bytes: Count

    def part(self, first: int, last: int) -> Handle:
        """Where blocks [first, last) are."""
        return replace(self, slots=self.slots[first:last], generations=self.generations[first:last])


class Offer(BetweenWorkers, tag="offer", frozen=True):
    """Asks a decode instance to take a request and to reserve `blocks` KV blocks for `prompt` + `output`, and as many
    again for each of its `siblings`. The answer, for all of them, is Grant, Defer or Refuse. `alone`: as in Assign.
    `canary`: it comes after all other offers. `tpot_s`: its limit of the mean time between two tokens.

    A decode that runs at the sender has a `receipt`: how its KV came there. `blocks` are then for `written` too, its
    output tokens in this attempt so far but the last, and for `ahead` tokens that it may write until it stops there.
    Its first token is `decoded_s` seconds old."""

    fingerprint: Fingerprint
    prompt: list[int]
    output: list[int]
    sampling: Sampling
    blocks: Count
    length: LengthRange | None = None  # None: not predicted
    waited_s: float = 0.0  # seconds since a decode instance was first looked for, for this attempt
    alone: bool = False
    siblings: list[Sibling] = []
    canary: bool = False
    tpot_s: float | None = None
    receipt: Receipt | None = None
    written: list[int] = []
    ahead: Count = 0
    decoded_s: float = 0.0

    @property
    def tokens(self) -> list[int]:
        """The tokens that are known now of those whose KV comes."""
        return [*self.prompt, *self.output, *self.written]

    def choices(self) -> list[Offer]:
        """Return the offer of each choice as if it were alone."""
        if not self.siblings:
            return [self]
        lead = self.changed(siblings=[])
        return [lead, *(lead.changed(**self._of(sibling)) for sibling in self.siblings)]

    def _of(self, sibling: Sibling) -> dict[str, Any]:
        sampling = self.sampling.changed(seed=sibling.seed)
        return {"rid": sibling.rid, "attempt": sibling.attempt, "sampling": sampling}


class LengthUpdate(BetweenWorkers, tag="length_update", frozen=True):
    """A newer predicted range that replaces the Offer's. Best effort, without an answer: if it is lost, the earlier
    range stays in use."""

    length: LengthRange


class Grant(BetweenWorkers, tag="grant", frozen=True):
    """The decode instance has reserved the blocks of the Offer."""


class Defer(BetweenWorkers, tag="defer", frozen=True):
    """The decode instance has no memory for the Offer now. It keeps the Offer and its chunks: a Grant follows when
    there is memory, if the Offer is repeated until then."""


class Refuse(BetweenWorkers, tag="refuse", frozen=True):
    """Refuses an Offer. Also the answer to any message about an offer that the decode instance does not know.
    `unread`: KV that was announced could not be read here; another instance may be able to. `corrupt`: it could, and
    the bytes do not match their digest."""

    why: str
    corrupt: bool = False
    unread: bool = False


class Chunk(BetweenWorkers, tag="chunk", frozen=True):
    """Announces a KV chunk: the prompt's blocks [start, stop) can be fetched at `handle`. `digest`: xxh3-64 of their
    bytes, None if digests are off. `tokens`, in the last chunk only: the first output token of each choice in the order
    of the Offer; None for one that has ended meanwhile. They are `decoded_s` seconds old. Instead of it, in the last
    chunk of a decode that runs at the sender until then: `written`, all its output tokens in this attempt."""

    index: Count
    start: Count
    stop: Count
    handle: Handle
    digest: int | None
    tokens: list[Token | None] = []
    written: list[Token] = []
    decoded_s: float = 0.0


class Landed(BetweenWorkers, tag="landed", frozen=True):
    """The decode instance has KV chunk `index` in its own memory with the right digest: the prefill instance may free
    the chunk."""

    index: Count


class Drop(BetweenWorkers, tag="drop", frozen=True):
    """The prefill instance withdraws the offer: the decode instance releases the reservation."""

    why: str
