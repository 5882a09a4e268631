"""One attempt of one request on the prefill side, and its KV on the way out.

offered -> granted -> every chunk announced and landed. The prefill instance announces chunks without waiting for the
Grant and keeps each until its Landed; after a Refuse the same slots are offered elsewhere, unless one was freed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tetri.policy.length import end_of, heavy
from tetri.policy.rules import Rules
from tetri.policy.views import Need, QueuedPrompt
from tetri.request import Capacity, LengthRange, Receipt, Sampling, Stage, blocks_for
from tetri.wire.handover import Handle
from tetri.wire.messages import End


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
class PrefillRequest:
    """One attempt of one request on the prefill side. `tokens` is prompt + output of earlier attempts."""

    key: str
    rid: str
    attempt: int
    prompt: tuple[int, ...]
    output: tuple[int, ...]
    sampling: Sampling
    queued: QueuedPrompt
    flow: KVOutflow
    goal: int  # tokens of the prompt and of the output of earlier attempts
    left_s: float = 0.0  # predicted seconds of the prefill that is still to be done
    length: LengthRange | None = None
    predicted: bool = True  # False while its length is being predicted
    answered: bool = True  # False from `Predict` until its answer has come
    estimated: bool = False  # by its own hidden state, and nobody knows better
    done: int = 0  # tokens computed
    turn: int = 0  # its place in the order in which jobs were started; 0: not yet
    running: bool = False  # the engine has its leg
    held: bool = False  # the engine was told to keep its leg out of the steps
    token: int | None = None  # the one that prefill yields
    end: End | None = None  # when that token ended the request
    unplaceable_since: float | None = None  # since when no decode instance exists for it

    @property
    def decodes(self) -> bool:
        """Whether anything may follow the first token."""
        return self.end is None and len(self.output) + 1 < self.sampling.max_tokens

    @property
    def unplaced(self) -> bool:
        """Started, to be decoded, and on offer nowhere."""
        return bool(self.turn) and self.flow.offer is None and self.decodes and not self.flow.complete

    @property
    def granted(self) -> bool:
        return self.flow.offer is not None and self.flow.granted

    def fits(self, capacity: Capacity) -> bool:
        """Whether an engine can hold the whole request, its longest output included."""
        tokens = len(self.prompt) + self.sampling.max_tokens
        return self.goal < capacity.context and blocks_for(tokens, capacity.block_tokens) <= capacity.blocks

    def need(self, rules: Rules, block_tokens: int) -> Need:
        """What it will take on a decode instance, by the end of its range that `rules.dispatch_end` names."""
        most = self.sampling.max_tokens
        end = max(end_of(self.length, rules.dispatch_end, most), len(self.output) + 2)  # one token more than the first
        blocks = blocks_for(len(self.prompt) + end, block_tokens)
        return Need(self.flow.blocks, blocks, heavy(self.length, rules.heavy_tokens, most))

    def filled(self, done: int, block_tokens: int) -> int:
        """Up to which block all are complete, or were exported, once `done` tokens are computed. None of a request
        that its first token ends: nobody would take them out of the store."""
        if not self.decodes:
            return self.flow.exported
        return max(self.flow.blocks if done == self.goal else done // block_tokens, self.flow.exported)

    @property
    def stage(self) -> Stage:
        if self.token is not None:
            return Stage.DONE if self.end else Stage.MOVING
        return Stage.PREFILL if self.running else Stage.QUEUED

    def outputs(self) -> list[int]:
        return [*self.output, *([] if self.token is None else [self.token])]

    def receipt(self, iid: str) -> Receipt:
        """Of a request that its first token ends on this instance: nobody used the KV that may have left already."""
        return Receipt(
            prompt_tokens=len(self.prompt),
            adopted=0,
            recomputed=0,
            kv_bytes=0,
            chunks=0,
            transport="none",
            prefill_instance=iid,
            preempted=0,
            refetched=0,
        )
