"""A request in its prefill phase, and its KV on the way to a decode instance.

offered -> deferred, while the decode instance has no memory -> granted -> every chunk announced and landed. The prefill
instance announces chunks without waiting for the Grant, and keeps each chunk until its Landed. After a Refuse it offers
the same slots to another instance, unless a chunk has landed already.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tetri.instance import Capacity
from tetri.policy.length import end_of, heavy
from tetri.policy.rules import Rules
from tetri.policy.views import Need, QueuedPrompt
from tetri.request import LengthRange, Receipt, Sampling, Slo, Stage, Token, Value, blocks_for
from tetri.wire.handover import Handle
from tetri.wire.messages import Assign, End


class KVChunk(Value, frozen=True):
    """One KV chunk in the sender's slab: blocks [start, stop), one slot each."""

    index: int
    start: int
    stop: int
    handle: Handle
    digest: int | None


@dataclass(slots=True)
class PrefillChoice:
    """One choice of a prefill request, in its own attempt. The broker knows it by `rid`, the engine by `key`."""

    key: str
    rid: str
    attempt: int
    seed: int | None
    token: Token | None = None  # the first output token, once computed
    end: End | None = None  # set when that token, or an error instead of it, ended the choice
    closed: bool = False  # by the broker, or given up here

    @property
    def open(self) -> bool:
        """Whether more output may follow, its limit apart."""
        return self.end is None and not self.closed

    @property
    def computed(self) -> bool:
        """Whether its first token was computed, or an error instead."""
        return self.token is not None or self.end is not None


def key_of(rid: str, attempt: int) -> str:
    """Return the key of one attempt of a choice."""
    return f"p:{rid}:{attempt}"


def choices_of(message: Assign) -> list[PrefillChoice]:
    """Return the choices of an Assign."""
    rid, attempt = message.rid, message.attempt
    lead = PrefillChoice(key_of(rid, attempt), rid, attempt, message.sampling.seed)
    return [lead, *(PrefillChoice(key_of(s.rid, s.attempt), s.rid, s.attempt, s.seed) for s in message.siblings)]


@dataclass(slots=True)
class KVOutflow:
    """State of the KV send of one request. `offer`: number of the open offer, None while there is none."""

    blocks: int  # of the whole prompt
    offer: int | None = None
    choices: list[PrefillChoice] = field(default_factory=list)  # on offer; the first one's id is that of the hand-over
    target: str = ""
    granted: bool = False
    deferred: bool = False  # the decode instance has no memory yet, and grants the offer later
    stays: str = ""  # key of its decode request on this instance, if it decodes where it was prefilled
    moved: bool = False  # an earlier offer came to nothing
    announced: int = 0  # how many of `sent` were announced under the open offer
    grant_lost: bool = False  # an earlier grant came to nothing
    in_flight: dict[int, KVChunk] = field(default_factory=dict)  # exported and not landed, by index
    landed: int = 0  # blocks that have landed; their slots here are freed
    exported: int = 0  # blocks exported, landed ones included
    chunks: int = 0  # chunks exported; the index of the next one
    awaited: dict[int, tuple[int, int, float]] = field(default_factory=dict)  # exports: index -> [start, stop), since
    sent: list[KVChunk] = field(default_factory=list)  # all exported chunks, landed ones included
    unread: dict[str, None] = field(default_factory=dict)  # decode instances that could not read its KV

    @property
    def complete(self) -> bool:
        """Whether the decode instance has all KV of the prompt."""
        return self.landed == self.blocks

    @property
    def kept(self) -> int:
        """Blocks in the sender's slab, pending exports included."""
        return 0 if self.stays else self.exported - self.landed

    def unannounced(self) -> list[KVChunk]:
        """Return the chunks to announce now, and count them as announced. The decode instance is told of chunks once it
        has granted the offer, and at first without waiting for its answer: an offer that was deferred or refused may
        move on."""
        if self.offer is None or not self.granted and (self.moved or self.deferred):
            return []
        chunks = self.sent[self.announced :]
        self.announced = len(self.sent)
        return chunks

    @property
    def movable(self) -> bool:
        """Whether another decode instance can still be asked: no chunk has landed."""
        return self.landed == 0

    def put(self, chunk: KVChunk) -> None:
        """Add a chunk that is in the slab now."""
        self.in_flight[chunk.index] = chunk
        self.sent.append(chunk)

    def land(self, index: int) -> Handle | None:
        """Record that a chunk has landed. Return its handle, to be freed; None when it had landed before."""
        self.grant()  # a chunk lands only after a grant; another offer would reserve memory again, without that chunk
        chunk = self.in_flight.pop(index, None)
        if chunk is None:
            return None
        self.landed += chunk.stop - chunk.start
        return chunk.handle

    def grant(self) -> None:
        """Record that the decode instance has reserved memory for the prompt."""
        self.granted, self.deferred, self.grant_lost = True, False, False

    def aim(self, offer: int, target: str, choices: list[PrefillChoice]) -> None:
        """Set the open offer, its decode instance and its choices."""
        self.offer, self.target, self.granted, self.deferred, self.announced = offer, target, False, False, 0
        self.choices = choices

    def clear_aim(self) -> None:
        """Forget the open offer; a grant that it had is lost."""
        self.grant_lost, self.moved = self.grant_lost or self.granted, True
        self.offer, self.target, self.granted, self.deferred, self.choices = None, "", False, False, []

    def stay(self, decode_key: str) -> list[Handle]:
        """Record that the request decodes on this instance: its KV goes nowhere. Return what of it left the engine
        already, to be freed."""
        self.grant()
        self.stays = decode_key
        self.awaited.clear()
        return self.drain()

    def stayed(self) -> None:
        """Record that all KV is there, in the blocks of the decode request."""
        self.landed = self.exported = self.blocks

    def drain(self) -> list[Handle]:
        """Give up all chunks, and return the handles to free."""
        handles = [chunk.handle for chunk in self.in_flight.values()]
        self.in_flight.clear()
        return handles


@dataclass(slots=True)
class PrefillRequest:
    """The choices that one engine request computes on the prefill instance, often a single one: they have the same
    prompt. `key`: of the engine request, which is that of the first choice. `output`: output tokens of earlier
    attempts. `sampling`: of the first choice; that of another one differs in its seed."""

    key: str
    choices: list[PrefillChoice]
    prompt: tuple[int, ...]
    output: tuple[int, ...]
    sampling: Sampling
    queued: QueuedPrompt
    flow: KVOutflow
    goal: int  # tokens of the prompt and of the output of earlier attempts
    left_s: float = 0.0  # seconds of the remaining prefill, by the cost table
    length: LengthRange | None = None
    predicted: bool = True  # False while its offer waits for a length prediction
    answered: bool = True  # False from `Predict` until `LengthKnown`
    estimated: bool = False  # `length` is the estimate of its own hidden state, the best there is
    done: int = 0  # tokens computed
    wanted_at: float | None = None  # when a decode instance was first looked for
    asked_at: float = 0.0  # when its offer was last sent
    computed_at: float = 0.0  # when it got its first tokens
    turn: int = 0  # place in the order of starts; 0: not started
    running: bool = False  # its engine request is in the engine
    held: bool = False  # the engine keeps it out of the steps (HoldRequest)
    unplaceable_since: float | None = None  # since when no decode instance is large enough for it
    alone: bool = False  # it is computed in lone steps only (Assign.alone)
    lost: tuple[str, ...] = ()  # decode instances that were lost with it: they get it only if no other has memory
    avoid: tuple[str, ...] = ()  # instances between which the KV of earlier attempts could not be moved
    pinned: str = ""  # of a canary: the only decode instance to offer it to (Assign.pinned)
    slo: Slo = Slo()  # its limits; `ttft_s` as of its arrival here

    @property
    def computed(self) -> bool:
        """Whether the engine has computed all of the prompt."""
        return self.choices[0].computed

    @property
    def left(self) -> QueuedPrompt:
        """What is left of the prompt."""
        tokens = self.goal - self.done
        queued = self.queued
        work_s = queued.work_s * tokens / self.goal
        return QueuedPrompt(queued.key, queued.arrival, tokens, queued.since, work_s, queued.due)

    @property
    def lead(self) -> PrefillChoice:
        """The choice that stands for all in messages that name one: the first that goes on."""
        first = self.choices[0]
        if first.open or len(self.choices) == 1:
            return first
        return next((choice for choice in self.choices if choice.open), first)

    def open(self) -> list[PrefillChoice]:
        """Return the choices that go on, their limit apart."""
        return [choice for choice in self.choices if choice.open]

    @property
    def decodes(self) -> bool:
        """Whether more output may follow the first token, of any choice."""
        return len(self.output) + 1 < self.sampling.max_tokens and self.lead.open

    @property
    def may_stay(self) -> bool:
        """Whether it can still decode in the engine that prefills it, without a copy of its KV. Each further choice
        needs a copy."""
        return self.running and not self.computed and len(self.choices) == 1

    @property
    def unplaced(self) -> bool:
        """Whether it has started, needs a decode instance, and is on offer to none."""
        return bool(self.turn) and self.flow.offer is None and self.decodes and not self.flow.complete

    @property
    def lacks_memory(self) -> bool:
        """Whether it has started and no decode instance has memory for it: its offer is deferred, or there is none."""
        return self.unplaced or self.flow.deferred

    @property
    def granted(self) -> bool:
        """Whether the decode instance of its open offer has reserved memory for it."""
        return self.flow.granted

    @property
    def may_decode(self) -> bool:
        """Whether the decode instance of its open offer may have begun to decode it: all KV was announced. Its last
        messages, the Grant included, may be lost."""
        flow = self.flow
        return self.computed and flow.exported == flow.blocks and flow.announced == flow.chunks

    def least(self, block_tokens: int) -> int:
        """Return how many blocks its decode instance must have: for the prompt once per choice, and for one choice with
        its longest possible output."""
        most = blocks_for(len(self.prompt) + self.sampling.max_tokens, block_tokens)
        return most if len(self.choices) == 1 else max(most, self.flow.blocks * len(self.open()))

    def fits(self, capacity: Capacity) -> bool:
        """Return whether a decode instance is large enough for it."""
        return self.goal < capacity.context and self.least(capacity.block_tokens) <= capacity.blocks

    def need(self, rules: Rules, block_tokens: int) -> Need:
        """Return the load that its choices add to a decode instance, from the end of the length range that
        `rules.dispatch_end` names."""
        most = self.sampling.max_tokens
        end = max(end_of(self.length, rules.dispatch_end, most), len(self.output) + 2)  # one token more than the first
        blocks = blocks_for(len(self.prompt) + end, block_tokens)
        count = len(self.open())
        return Need(self.flow.blocks * count, blocks * count, heavy(self.length, rules.heavy_tokens, most), count)

    def filled(self, done: int, block_tokens: int) -> int:
        """Return how many leading blocks are complete, or were exported, once `done` tokens are computed. A request
        that ends with its first token, or decodes here, exports no more blocks: no instance would fetch them."""
        if self.flow.stays or not self.decodes:
            return self.flow.exported
        return max(self.flow.blocks if done == self.goal else done // block_tokens, self.flow.exported)

    def stage(self, choice: PrefillChoice) -> Stage:
        """Return the stage of a choice that a heartbeat reports."""
        if choice.computed:
            return Stage.DONE if choice.end else Stage.MOVING
        return Stage.PREFILL if self.running else Stage.QUEUED

    def outputs(self, choice: PrefillChoice) -> list[Token]:
        """Return the output tokens of a choice, of all attempts."""
        return [*self.output, *([] if choice.token is None else [choice.token])]

    def firsts(self) -> list[Token | None]:
        """Return the first tokens of the choices on offer; None for those that have ended."""
        return [choice.token if choice.open else None for choice in self.flow.choices]

    def receipt(self, iid: str) -> Receipt:
        """Return the receipt of a choice that ends with its first token, on this instance `iid`. KV that was sent
        already does not count: this choice did not use it."""
        return Receipt(
            prompt_tokens=len(self.prompt),
            local=len(self.prompt),
            adopted=0,
            recomputed=0,
            kv_bytes=0,
            chunks=0,
            transport="none",
            prefill_instance=iid,
            preempted=0,
            refetched=0,
        )
