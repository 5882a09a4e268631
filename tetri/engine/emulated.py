"""An engine without a model. Its steps take the time of a cost table, and its text depends on its KV.

KV bytes are a rolling hash of the tokens, so a block's bytes depend on every earlier token. An output token is a hash
of its position and the KV bytes *read from the request's own blocks*: lost, stale or mixed-up KV changes the text.
`reference` computes the correct text from the prompt alone, and `logprob_of` the log probabilities of a token. `Paged`
keeps the counts of blocks and the running batch; this module adds block ids and bytes.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, log1p

import numpy as np
import xxhash

from tetri.cost import Cost
from tetri.engine.base import EngineError, EngineRequest, StepDone, check_budget
from tetri.engine.paged import Paged
from tetri.engine.plan import EOS, NO_TOKEN, Slot, StepPlan, ends_text
from tetri.instance import Capacity, Fingerprint
from tetri.kv.base import joined
from tetri.request import MAX_BIAS, Sampling, Token, TokenId, TokenLogprob, token_ids

Bytes = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


def sleep(seconds: float) -> bool:
    """The default `wait`: sleep, and report that no message waits."""
    time.sleep(seconds)
    return False


def unsalted(key: str) -> int:
    """The default `salt`: the tokens depend on the KV alone."""
    return 0


def die() -> None:
    """The default `die`: end the process at once, as a fault in native code does."""
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(slots=True)
class Content:
    """The tokens of an engine request, sampled ones included, its salt, and the ids of its blocks."""

    tokens: list[int]
    salt: int
    blocks: list[int] = field(default_factory=list)


class EmulatedEngine:
    """Implements `Engine` of base.py. `wait(seconds)` waits for the rest of a step and returns whether a message waits,
    which ends a run of several passes; it may be set later. `clock`: seconds; it measures the time for the hashes,
    which is part of the step. `time_scale` multiplies all times of the cost table. `salt(key)`: mixed into the tokens
    of an engine request, see salted.py; 0 changes nothing. Raises EngineError for invalid sizes.

    Faults: after the id `nan_token` the model computes no valid number; a step that computes the id `deadly_token`
    calls `die`. None: no such id."""

    def __init__(
        self,
        *,
        capacity: Capacity,
        token_bytes: int,
        vocabulary: int,
        cost: Cost,
        time_scale: float = 1.0,
        nan_token: int | None = None,
        deadly_token: int | None = None,
        die: Callable[[], None] = die,
        wait: Callable[[float], bool] = sleep,
        clock: Callable[[], float] = time.monotonic,
        salt: Callable[[str], int] = unsalted,
    ) -> None:
        if token_bytes % 8:
            raise EngineError(f"emulated.token_bytes must be a multiple of 8, got {token_bytes}")
        check_budget(capacity.chunk_tokens, capacity.max_batch)
        self.paged, self.nan_token = Paged(capacity, cost), nan_token
        self.deadly_token, self.die = deadly_token, die
        self.capacity, self.vocabulary, self.token_bytes = capacity, vocabulary, token_bytes
        self.time_scale, self.wait, self.clock, self.salt = time_scale, wait, clock, salt
        self.memory: Bytes = np.zeros((capacity.blocks, capacity.block_tokens, token_bytes), np.uint8)
        self.free = list(range(capacity.blocks))
        self.contents: dict[str, Content] = {}  # by key, for the engine requests of `paged`
        self.logprobs: dict[str, list[Token]] = {}  # by key, where asked for: the tokens of this step
        self.left: dict[str, list[int]] = {}  # by key: blocks of requests that ended in the last step, still readable
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

    # ------------------------------------------------------------ engine requests

    def add(self, request: EngineRequest) -> None:
        if not all(0 <= token < self.vocabulary for token in request.tokens):
            raise EngineError(f"a token is outside the vocabulary of {self.vocabulary}")
        self.paged.add(request)
        self.contents[request.key] = Content(list(request.tokens), self.salt(request.key))

    def cancel(self, key: str) -> None:
        self.paged.cancel(key)
        self.left.pop(key, None)
        content = self.contents.pop(key, None)
        if content is not None:
            self._release(content)

    def admit(self, key: str, token: int, further: Sequence[int] = ()) -> None:
        self.paged.admit(key, token, further)
        self.contents[key].tokens += [token, *further]

    def hold(self, key: str, held: bool) -> None:
        self.paged.hold(key, held)

    def stay(self, key: str, decode_key: str) -> None:
        self.paged.stay(key, decode_key)

    # ------------------------------------------------------------ a step

    def step(self, most: int = 1, chunk: int | None = None) -> StepDone:
        plan, start = self.plan(most, chunk), self.clock()

        def ends(passes: int) -> bool:
            """Let the rest of the time of the last pass go by; whether a message waits."""
            seconds = plan.seconds(passes) * self.time_scale
            return self.wait(max(0.0, start + seconds - self.clock())) if seconds else False

        return self._finish(plan, self._compute_passes(plan, plan.steps, ends))

    def plan(self, most: int = 1, chunk: int | None = None) -> StepPlan:
        """As `Paged.plan`. For the simulator, which lets the time go by itself before it calls `run`."""
        self.left.clear()
        plan = self.paged.plan(most, chunk)
        for key in plan.preempted:
            self._release(self.contents[key])
        for key in plan.allocated:
            self._fit(self.paged.slots[key], 0)
        return plan

    def run(self, plan: StepPlan, steps: int) -> StepDone:
        """Compute the first `steps` passes of the plan, fewer when a text ends in one of them. Takes no time."""
        return self._finish(plan, self._compute_passes(plan, steps, lambda passes: False))

    def _finish(self, plan: StepPlan, steps: int) -> StepDone:
        stays = {span.key: self.paged.slots[span.key].stays for span in plan.chunk}
        done = self.paged.finish(plan, steps, self._newest)
        if self.logprobs:
            tokens = [each.changed(ids=tuple(self.logprobs.pop(each.key, each.ids))) for each in done.tokens]
            done = done.changed(tokens=tuple(tokens))
        for sampled in done.tokens:
            if sampled.key not in self.paged.slots:
                content = self.contents.pop(sampled.key, None)
                if content is None:
                    continue  # a sibling
                decode_key = stays.get(sampled.key, "")
                if decode_key in self.paged.slots:
                    content.tokens.pop()  # `admit` brings it
                    content.salt = self.salt(decode_key)
                    self.contents[decode_key] = content
                    continue
                self.left[sampled.key] = content.blocks
                self._release(content)
        return done

    def _newest(self, slots: Sequence[Slot], count: int) -> list[tuple[int, ...]]:
        return [tuple(self.contents[slot.key].tokens[-count:]) for slot in slots]

    def _compute_passes(self, plan: StepPlan, most: int, ends: Callable[[int], bool]) -> int:
        """Compute up to `most` passes. Stops after a pass in which an output ends, or for which `ends`, given the
        number of passes so far, returns True. Returns the number of passes."""
        slots = self.paged.slots
        for span in plan.chunk:
            self._compute(slots[span.key], span.start, span.stop)
        again = {span.key: span.start for span in plan.again}
        for passes in range(most):
            ended = False
            for slot in plan.batch:
                stop = slot.known + passes
                ended |= self._compute(slot, again.pop(slot.key, stop - 1), stop)
            if ends(passes + 1) or ended:
                return passes + 1
        return most

    def _compute(self, slot: Slot, start: int, stop: int) -> bool:
        """Write the KV of positions [start, stop). Sample a token if the tokens known so far end there, and one for
        each sibling; returns whether the first of them ends the text."""
        content = self.contents[slot.key]
        self._fit(slot, stop)
        if self.deadly_token is not None and self.deadly_token in content.tokens[start:stop]:
            self.die()
        state = self._state(content, start)
        for position in range(start, stop):
            state = roll(state, content.tokens[position])
            row, column = divmod(position, self.capacity.block_tokens)
            self.memory[content.blocks[row], column] = np.frombuffer(state * (self.token_bytes // 8), np.uint8)
        if stop < len(content.tokens):
            return False
        sampling, siblings = slot.request.sampling, slot.request.siblings
        if self.nan_token is not None and self.nan_token in content.tokens:
            content.tokens += [NO_TOKEN] * (1 + len(siblings))
            return True
        kv = self.memory[content.blocks].reshape(-1, self.token_bytes)[:stop].tobytes()  # from its own blocks
        token = self._sample(slot.key, slot, kv, stop, sampling)
        for key, seed in siblings:
            self._sample(key, slot, kv, stop, sampling.changed(seed=seed))
        return ends_text(token, sampling)

    def _sample(self, key: str, slot: Slot, kv: bytes, position: int, sampling: Sampling) -> int:
        content, outputs = self.contents[slot.key], position - slot.request.output_from
        token = next_token(kv, position, outputs, sampling, self.vocabulary, content.salt)
        content.tokens.append(token)
        if sampling.logprobs is not None:
            made = logprob_of(token, kv, position, sampling.logprobs, self.vocabulary, content.salt)
            self.logprobs.setdefault(key, []).append(made)
        return token

    # ------------------------------------------------------------ memory

    def export(self, key: str, start: int, stop: int, into: Sequence[memoryview]) -> None:
        owned = self.contents[key].blocks if key in self.contents else self.left[key]
        for place, block in zip(into, owned[start:stop], strict=True):
            place[:] = self.memory[block].reshape(-1).data

    def adopt(self, key: str, start: int, blocks: Sequence[memoryview]) -> None:
        slot = self.paged.slots.get(key)
        if slot is None or not slot.ready:
            raise EngineError(f"engine request {key!r} has no blocks that wait for KV")
        owned, stop = self.contents[key].blocks, start + len(blocks)
        if not 0 <= start <= stop <= len(owned):
            raise EngineError(f"engine request {key!r} has {len(owned)} blocks; [{start}, {stop}) was asked")
        for block, content in zip(owned[start:stop], blocks, strict=True):
            self.memory[block] = np.frombuffer(joined(content), np.uint8).reshape(self.memory.shape[1:])

    def close(self) -> None:
        for key in list(self.contents):
            self.cancel(key)

    def _fit(self, slot: Slot, tokens: int) -> None:
        """Give the request one id for each of its blocks; within a run of passes, also for blocks of `tokens` that it
        gets at the end of the run."""
        blocks = self.contents[slot.key].blocks
        while len(blocks) * self.capacity.block_tokens < max(slot.held_tokens, tokens):
            blocks.append(self.free.pop())

    def _release(self, content: Content) -> None:
        self.free += content.blocks
        content.blocks = []

    def _state(self, content: Content, done: int) -> bytes:
        """The rolling hash after `done` tokens, read from the KV."""
        if done == 0:
            return bytes(8)
        row, column = divmod(done - 1, self.capacity.block_tokens)
        return self.memory[content.blocks[row], column, :8].tobytes()


def roll(state: bytes, token: int) -> bytes:
    """The rolling hash after one more token."""
    return xxhash.xxh3_64_digest(state + token.to_bytes(8, "little"))


def next_token(
    kv: bytes, position: int, outputs: int, sampling: Sampling, vocabulary: int, salt: int = 0
) -> int:
    """The token at `position` (0-based, prompt included), given the KV bytes before it and the number of output tokens
    before it: of the first `min_tokens`, none can end the text. The seed has an effect only with a temperature above 0.
    Of a bias only the extremes have one: the largest forces one of its tokens, the least forbids them."""
    seed = sampling.seed or 0 if sampling.temperature > 0 else 0
    token = xxhash.xxh3_64_intdigest(kv + position.to_bytes(8, "little"), seed ^ salt) % vocabulary
    token = token if token != EOS or not sampling.ignore_eos else 1
    bias, ends = sampling.logit_bias, (EOS, *sampling.stop_token_ids) if outputs < sampling.min_tokens else ()
    return _chosen(token, bias, ends, vocabulary) if bias or ends else token


def _chosen(token: int, bias: Mapping[TokenId, float], forbidden: Collection[TokenId], vocabulary: int) -> int:
    """One of the tokens that the bias forces, if there are any, else the first token from this one on that it does not
    forbid. Never one of `forbidden`, while there are others."""
    forced = [
        other
        for other, value in bias.items()
        if value == MAX_BIAS and other < vocabulary and other not in forbidden
    ]
    if forced:
        return forced[token % len(forced)]
    others = ((token + step) % vocabulary for step in range(vocabulary))
    allowed = (other for other in others if other not in forbidden and bias.get(other, 0.0) > -MAX_BIAS)
    return next(allowed, token)


def logprob_of(token: int, kv: bytes, position: int, top: int, vocabulary: int, salt: int = 0) -> TokenLogprob:
    """A token with its log probability, and the `top` most likely ones. They depend on the KV bytes alone: the greedy
    token is the most likely one, and each id after it is less likely than the one before, by a factor."""
    digest = xxhash.xxh3_64_intdigest(kv + position.to_bytes(8, "little"), salt)
    best, fall = digest % vocabulary, 0.25 + (digest >> 32) / (1 << 32)

    def logprob(rank: int) -> float:
        return log1p(-exp(-fall)) - fall * rank

    most = {(best + rank) % vocabulary: logprob(rank) for rank in range(min(top, vocabulary))}
    return TokenLogprob(token, logprob((token - best) % vocabulary), most)


def reference(prompt: Sequence[int], sampling: Sampling, vocabulary: int, token_bytes: int) -> list[int]:
    """The ids of the correct output tokens of a request, computed from its prompt alone."""
    return token_ids(reference_tokens(prompt, sampling, vocabulary, token_bytes))


def reference_tokens(prompt: Sequence[int], sampling: Sampling, vocabulary: int, token_bytes: int) -> list[Token]:
    """The correct output tokens of a request, with log probabilities if its `sampling` asks for them."""
    kv, state, output = bytearray(), bytes(8), list[Token]()
    for token in prompt:
        state = roll(state, token)
        kv += state * (token_bytes // 8)
    while len(output) < sampling.max_tokens:
        before, position = bytes(kv), len(prompt) + len(output)
        token = next_token(before, position, len(output), sampling, vocabulary)
        top = sampling.logprobs
        output.append(token if top is None else logprob_of(token, before, position, top, vocabulary))
        if ends_text(token, sampling):
            break
        state = roll(state, token)
        kv += state * (token_bytes // 8)
    return output
