"""An engine without a model. It sleeps what the cost table says, and its text proves its KV.

KV bytes are a rolling hash of the tokens, so a block's bytes depend on every token before it. An output token is
a hash of the KV bytes *read from the leg's own blocks* and the position: lost, stale or mixed-up KV changes the
text. `reference` computes the right text from the prompt alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import xxhash

from tetri.cost import Cost
from tetri.engine.base import EngineError, Leg, Sampled, Span, StepDone
from tetri.request import Capacity, Fingerprint, Sampling, blocks_for

EOS = 0  # the one id that ends a sequence
Bytes = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


@dataclass(slots=True)
class Slot:
    """A leg in the engine. `tokens` grows with what is sampled; KV exists for [0, done)."""

    leg: Leg
    tokens: list[int]
    blocks: list[int] = field(default_factory=list)
    done: int = 0
    allocated: bool = False
    admitted: bool = False


class EmulatedEngine:
    """`clock_sleep` is what passes the time of a step: seconds -> None."""

    def __init__(
        self,
        *,
        capacity: Capacity,
        token_bytes: int,
        vocabulary: int,
        cost: Cost,
        time_scale: float = 1.0,
        clock_sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if token_bytes % 8:
            raise EngineError(f"emulated.token_bytes must be a multiple of 8, got {token_bytes}")
        self.capacity, self.cost, self.vocabulary = capacity, cost, vocabulary
        self.time_scale, self.clock_sleep = time_scale, clock_sleep
        self.token_bytes = token_bytes
        self.memory: Bytes = np.zeros((capacity.blocks, capacity.block_tokens, token_bytes), np.uint8)
        self.free = list(range(capacity.blocks))
        self.slots: dict[str, Slot] = {}
        self.left: dict[str, list[int]] = {}  # blocks of legs that ended in the last step, readable until the next
        self.fingerprint = Fingerprint(
            engine="emulated",
            version="1",
            isa="any",
            model="rolling-hash",
            weights=str(vocabulary),
            dtype="u8",
            kv_dtype="u8",
            block_tokens=capacity.block_tokens,
            block_bytes=capacity.block_tokens * token_bytes,
            layers=1,
            kv_heads=1,
            head_dim=token_bytes,
        )

    # ------------------------------------------------------------ legs

    def add(self, leg: Leg) -> None:
        left = leg.sampling.max_tokens - (len(leg.tokens) - leg.output_from)
        if not leg.tokens or left < 1 or len(leg.tokens) + 1 > self.capacity.context:
            raise EngineError(f"{len(leg.tokens)} tokens and {left} more do not fit into the context")
        if not all(0 <= token < self.vocabulary for token in leg.tokens):
            raise EngineError(f"a token is outside the vocabulary of {self.vocabulary}")
        if leg.key in self.slots:
            raise EngineError(f"leg {leg.key} is already here")
        self.slots[leg.key] = Slot(leg, list(leg.tokens))

    def cancel(self, key: str) -> None:
        self.left.pop(key, None)
        slot = self.slots.pop(key, None)
        if slot is not None:
            self._release(slot)

    def admit(self, key: str, token: int) -> None:
        slot = self.slots[key]
        slot.admitted, slot.done = True, len(slot.tokens)
        slot.tokens.append(token)

    # ------------------------------------------------------------ a step

    def step(self) -> StepDone:
        self.left.clear()
        allocated = self._allocate_decodes()
        chunk = self._chunk()
        decodes, preempted = self._decodes()
        context = sum(len(slot.tokens) for slot in decodes)
        fresh = [Span(s.leg.key, s.done, len(s.tokens)) for s in decodes]
        redone = [span for span in fresh if span.stop - span.start > 1]  # after a preemption
        seconds = self.cost.chunk_s([*chunk, *redone]) + self.cost.decode_s(len(decodes), context)
        if seconds:
            self.clock_sleep(seconds * self.time_scale)
        sampled = [token for span in [*chunk, *fresh] if (token := self._compute(span)) is not None]
        held = tuple((key, len(slot.blocks)) for key, slot in self.slots.items() if slot.blocks)
        return StepDone((*chunk, *fresh), tuple(sampled), tuple(allocated), tuple(preempted), held)

    def _allocate_decodes(self) -> list[str]:
        """Blocks for parked decode legs, oldest first, as far as they go."""
        found = []
        for key, slot in self.slots.items():
            if slot.leg.phase == "decode" and not slot.allocated:
                if not self._grow(slot, len(slot.leg.tokens)):
                    break
                slot.allocated = True
                found.append(key)
        return found

    def _chunk(self) -> list[Span]:
        room, spans = self.capacity.chunk_tokens, []
        for slot in self.slots.values():
            if slot.leg.phase == "prefill" and room:
                if not self._grow(slot, len(slot.tokens)):
                    break
                stop = min(slot.done + room, len(slot.tokens))
                spans.append(Span(slot.leg.key, slot.done, stop))
                room -= stop - slot.done
        return spans

    def _decodes(self) -> tuple[list[Slot], list[str]]:
        """The running batch, oldest first. When memory is short the youngest gives its blocks back and starts
        over when there is room again (as vLLM does)."""
        running = [slot for slot in self.slots.values() if slot.admitted]
        batch: list[Slot] = []
        preempted: list[str] = []
        while running:
            slot = running.pop(0)
            while not self._grow(slot, len(slot.tokens)):
                holders = [other for other in running if other.blocks]
                victim = holders[-1] if holders else slot
                if victim.blocks:
                    self._release(victim)
                    preempted.append(victim.leg.key)
                victim.done = 0
                if victim is slot:
                    break
            if slot.blocks:
                batch.append(slot)
        return batch, preempted

    def _compute(self, span: Span) -> Sampled | None:
        """Write the KV of the span; the token that follows when the span reaches the end of what is known."""
        slot = self.slots[span.key]
        state = self._state(slot, span.start)
        for position in range(span.start, span.stop):
            state = _roll(state, slot.tokens[position])
            row, column = divmod(position, self.capacity.block_tokens)
            self.memory[slot.blocks[row], column] = np.frombuffer(state * (self.token_bytes // 8), np.uint8)
        slot.done = span.stop
        if span.stop < len(slot.tokens):
            return None
        token = next_token(self._read(slot), span.stop, slot.leg.sampling, self.vocabulary)
        slot.tokens.append(token)
        return self._sampled(slot, token)

    def _sampled(self, slot: Slot, token: int) -> Sampled:
        sampling, outputs = slot.leg.sampling, len(slot.tokens) - slot.leg.output_from
        reason = "stop" if token == EOS and not sampling.ignore_eos else None
        if reason is None and (outputs >= sampling.max_tokens or len(slot.tokens) >= self.capacity.context):
            reason = "length"
        if reason or slot.leg.phase == "prefill":
            self.left[slot.leg.key] = slot.blocks
            self._release(self.slots.pop(slot.leg.key))
        return Sampled(slot.leg.key, (token,), reason)

    # ------------------------------------------------------------ memory

    def export(self, key: str, start: int, stop: int, into: Sequence[memoryview]) -> None:
        owned = self.slots[key].blocks if key in self.slots else self.left[key]
        for place, block in zip(into, owned[start:stop], strict=True):
            place[:] = self.memory[block].reshape(-1).data

    def adopt(self, key: str, start: int, blocks: Sequence[memoryview]) -> None:
        slot = self.slots[key]
        for block, content in zip(slot.blocks[start : start + len(blocks)], blocks, strict=True):
            self.memory[block] = np.frombuffer(content, np.uint8).reshape(self.memory.shape[1:])

    def close(self) -> None:
        self.slots.clear()

    def _grow(self, slot: Slot, tokens: int) -> bool:
        need = blocks_for(tokens, self.capacity.block_tokens) - len(slot.blocks)
        if need > len(self.free):
            return False
        slot.blocks += [self.free.pop() for _ in range(need)]
        return True

    def _release(self, slot: Slot) -> None:
        self.free += slot.blocks
        slot.blocks = []

    def _state(self, slot: Slot, done: int) -> bytes:
        """The rolling hash after `done` tokens, as it stands in memory."""
        if done == 0:
            return bytes(8)
        row, column = divmod(done - 1, self.capacity.block_tokens)
        return self.memory[slot.blocks[row], column, :8].tobytes()

    def _read(self, slot: Slot) -> bytes:
        """The KV bytes of all tokens computed, from the leg's own blocks."""
        used = self.memory[slot.blocks].reshape(-1, self.token_bytes)[: slot.done]
        return used.tobytes()


def _roll(state: bytes, token: int) -> bytes:
    return xxhash.xxh3_64_digest(state + token.to_bytes(8, "little"))


def next_token(kv: bytes, position: int, sampling: Sampling, vocabulary: int) -> int:
    """The token at `position` (0-based, prompt included), given the KV bytes before it. A seed matters only
    when tokens are drawn."""
    seed = sampling.seed or 0 if sampling.temperature > 0 else 0
    token = xxhash.xxh3_64_intdigest(kv + position.to_bytes(8, "little"), seed) % vocabulary
    return token if token != EOS or not sampling.ignore_eos else 1


def reference(prompt: Sequence[int], sampling: Sampling, vocabulary: int, token_bytes: int) -> list[int]:
    """The output tokens that a request must get, from its prompt alone."""
    kv, state, output = bytearray(), bytes(8), list[int]()
    for token in prompt:
        state = _roll(state, token)
        kv += state * (token_bytes // 8)
    while len(output) < sampling.max_tokens:
        token = next_token(bytes(kv), len(prompt) + len(output), sampling, vocabulary)
        output.append(token)
        if token == EOS and not sampling.ignore_eos:
            break
        state = _roll(state, token)
        kv += state * (token_bytes // 8)
    return output
