"""The messages between two workers: the KV hand-over. Those of the broker and the monitor stand in messages.py."""

from __future__ import annotations

from tetri.request import Count, Fingerprint, LengthRange, Name, Record, Sampling


class BetweenWorkers(Record, frozen=True):
    """`src` is the sender's instance id, `incarnation` the sender's."""

    src: Name
    incarnation: int
    rid: Name
    attempt: Count
    offer: Count


class Handle(Record, frozen=True):
    """Block i lies in slot `slots[i]` of `segment`, in generation `generations[i]`; a reused slot has another."""

    segment: str
    slots: list[Count]
    generations: list[Count]
    block_bytes: Count


class Offer(BetweenWorkers, tag="offer", frozen=True):
    """Will you decode this? Reserve `blocks` KV blocks for `prompt` + `output`; the answer is Grant or Refuse."""

    fingerprint: Fingerprint
    prompt: list[int]
    output: list[int]
    sampling: Sampling
    blocks: Count
    length: LengthRange | None = None  # None: not predicted


class LengthUpdate(BetweenWorkers, tag="length_update", frozen=True):
    """More is known of the length than when it was offered: this range replaces the Offer's. Best effort, no answer: a
    request whose LengthUpdate was lost goes on by what was said before."""

    length: LengthRange


class Grant(BetweenWorkers, tag="grant", frozen=True):
    pass


class Refuse(BetweenWorkers, tag="refuse", frozen=True):
    """Also the answer to anything that names an offer which the receiver does not know. `corrupt`: the KV bytes are
    not what was announced, so offering them again is of no use."""

    why: str
    corrupt: bool = False


class Chunk(BetweenWorkers, tag="chunk", frozen=True):
    """Blocks [start, stop) are ready at `handle`; `digest` is xxh3-64 over them. The last brings the first token."""

    index: Count
    start: Count
    stop: Count
    handle: Handle
    digest: int | None
    token: int | None = None


class Landed(BetweenWorkers, tag="landed", frozen=True):
    """This chunk is in my own memory with the right digest: the sender may free it."""

    index: Count


class Drop(BetweenWorkers, tag="drop", frozen=True):
    """The sender takes the offer back: give the reservation up."""

    why: str
