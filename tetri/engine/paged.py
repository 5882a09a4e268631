"""The scheduling of an engine with paged KV, without bytes and without time: block counts, batch and preemptions.

It makes no policy decision: it runs the engine requests of the core in the order of the contract
(tetri/engine/base.py). The emulated engine adds bytes and a clock, the simulator's engine adds virtual time.

A step has two calls, with no other call between them: `plan` allocates blocks and returns what will run and how long
it takes; `finish` returns the result. The order inside `plan`:

1. Allocate blocks for all tokens of waiting decode requests, oldest first, until one finds too few.
2. Allocate a block for each running decode request that needs one for its next position. When none is free, preempt
   the youngest of the batch (the one admitted last): it frees all of its blocks and waits.
3. If no request was preempted: resume preempted requests, oldest first, until one finds too few blocks for all of its
   tokens. A resumed request computes all of its tokens again in one step. That costs as much as a chunk of these
   tokens, besides its place in the decode batch, and uses as many tokens of the step's budget.
4. Give the rest of `chunk_tokens` to the prefill requests that are not held, in the order in which they were added. A
   request allocates the blocks of its whole prompt with its first chunk. One that finds too few waits, and so do all
   behind it.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence

from tetri.cost import Cost
from tetri.engine.base import EngineError
from tetri.engine.plan import EOS, NO_TOKEN, Ids, Slot, StepPlan, ends_text
from tetri.engine_request import INVALID, EngineRequest, Sampled, Span, StepDone
from tetri.instance import Capacity
from tetri.request import blocks_for


class Paged:
    """`free`: free blocks; `slots`: the engine requests by key. `cost`: the cost table for the step times. Raises
    EngineError when one context does not fit into `capacity`."""

    def __init__(self, capacity: Capacity, cost: Cost) -> None:
        if capacity.blocks * capacity.block_tokens < capacity.context:
            raise EngineError(
                f"{capacity.blocks} KV blocks of {capacity.block_tokens} tokens are too few for one context of "
                f"{capacity.context} tokens"
            )
        self.capacity, self.cost = capacity, cost
        self.free = capacity.blocks
        self.slots: dict[str, Slot] = {}
        self._parked: dict[str, Slot] = {}  # decode requests without blocks
        self._prefills: list[Slot] = []  # not held, in order of addition
        self._stays: dict[str, Slot] = {}  # prefill requests that go on here, by their key as decode requests
        self._batch: list[Slot] = []  # running, in order of admission; a resumed request is admitted anew
        self._context = 0  # tokens of the batch
        self._left = 0  # most passes until the first of the batch ends; 0: unknown
        self._short: list[Slot] = []  # of the batch: no block for their next position
        self._preempted: list[Slot] = []  # wait for blocks, oldest first
        self._resized: dict[str, Slot] = {}  # whose block counts the next StepDone reports
        self._added = self._admitted = 0

    # ------------------------------------------------------------ engine requests

    def add(self, request: EngineRequest) -> None:
        """As in `Engine`."""
        count = len(request.tokens)
        left = request.sampling.max_tokens - (count - request.output_from)
        if not count or left < 1 or count + 1 > self.capacity.context:
            raise EngineError(f"{count} tokens and {left} more do not fit into the context")
        if request.ahead >= min(left, self.capacity.context - count):
            raise EngineError(f"room for {request.ahead} tokens is too much: it ends before")
        if request.key in self.slots or request.key in self._stays:
            raise EngineError(f"engine request {request.key} is already there")
        self._added += 1
        slot = Slot(request, request.key, self._added, count, min(count + left, self.capacity.context))
        self.slots[request.key] = slot
        if request.phase == "decode":
            self._parked[request.key] = slot
        else:
            self._prefills.append(slot)

    def cancel(self, key: str) -> None:
        """As in `Engine`."""
        if key in self._stays:
            self._stays.pop(key).stays = ""
        slot = self.slots.pop(key, None)
        if slot is None:
            return
        self._stays.pop(slot.stays, None)
        self._parked.pop(key, None)
        if slot.running:
            self._batch.remove(slot)
            self._leave(slot)
        elif slot in self._preempted:
            self._preempted.remove(slot)
        elif slot in self._prefills:
            self._prefills.remove(slot)
        self._release(slot)

    def admit(self, key: str, token: int, further: Sequence[int] = ()) -> None:
        """As in `Engine`. Only counts the tokens; an engine that computes tokens keeps them."""
        slot = self.slots.get(key)
        if slot is None or not slot.ready:
            raise EngineError(f"engine request {key} does not wait for admission")
        if len(further) > slot.request.ahead:
            raise EngineError(f"engine request {key} has room for {slot.request.ahead} tokens, not {len(further)}")
        slot.ready = False
        slot.known += 1 + len(further)
        self._join(slot)

    def hold(self, key: str, held: bool) -> None:
        """As in `Engine`."""
        slot = self.slots.get(key)
        if slot is None or slot.held == held:
            return
        if slot.request.phase == "decode" and not slot.admitted:
            raise EngineError(f"engine request {key} is not admitted: such a decode request cannot be held")
        slot.held = held
        if slot.request.phase == "decode":
            self._hold_decode(slot)
        elif held:
            self._prefills.remove(slot)
        else:
            insort(self._prefills, slot, key=lambda slot: slot.number)

    def _hold_decode(self, slot: Slot) -> None:
        """Move a decode request out of the batch, or back to its place. A preempted one is in no batch."""
        if slot.held and slot.running:
            self._batch.remove(slot)
            self._leave(slot)
        elif not slot.held and slot not in self._preempted:
            self._enter(slot)

    def stay(self, key: str, decode_key: str) -> None:
        """As in `Engine`."""
        slot = self.slots.get(key)
        if slot is None or slot.request.phase == "decode" or slot.request.siblings or slot.stays:
            raise EngineError(f"engine request {key} cannot go on here: only a prefill without siblings can, once")
        if decode_key in self.slots or decode_key in self._stays:
            raise EngineError(f"engine request {decode_key} is already there")
        slot.stays = decode_key
        self._stays[decode_key] = slot

    # ------------------------------------------------------------ a step

    def plan(self, most: int = 1, chunk_tokens: int | None = None) -> StepPlan:
        """Allocate the blocks for the next pass; returns what runs in it, or in up to `most` passes."""
        allocated = self._allocate() if self._parked else ()
        preempted = self._grow() if self._short else ()
        again = self._resume() if self._preempted and not preempted else ()
        chunk = self._chunk(again, chunk_tokens) if self._prefills else ()
        steps = 1
        if most > 1 and self._batch and not (allocated or preempted or again or chunk):
            steps = self._affordable(min(most, self._passes()))
        return StepPlan(self.cost, steps, self._batch, self._context, chunk, again, allocated, preempted)

    def finish(self, plan: StepPlan, steps: int, ids: Ids) -> StepDone:
        """The first `steps` passes of the plan are done. `ids(slots, count)` returns the tokens that they gave. A token
        that ends a request, or NO_TOKEN, must be its last one. Returns the result of the step."""
        tokens = self._advance(steps, ids) if plan.batch else []
        for span in plan.chunk:
            slot = self.slots[span.key]
            slot.done = span.stop
            if span.stop == slot.known:
                keys = (slot.key, *(key for key, _ in slot.request.siblings))
                (firsts,) = ids([slot], len(keys))
                slot.known += 1
                first_tokens = [self._sampled(key, slot, (first,)) for key, first in zip(keys, firsts, strict=True)]
                tokens += first_tokens
                self._prefills.remove(slot)
                if slot.stays and first_tokens[0].reason is None:
                    self._turn(slot)
                else:
                    self._remove(slot)
        held: tuple[tuple[str, int], ...] = ()
        if self._resized:
            size = self.capacity.block_tokens
            held = tuple([(key, slot.held_tokens // size) for key, slot in self._resized.items()])
            self._resized = {}
        return StepDone(plan.again + plan.chunk, tuple(tokens), plan.allocated, plan.preempted, held, steps)

    def check(self) -> None:
        """Recount blocks and tokens. Raises AssertionError when a counter is wrong."""
        held = sum(slot.held_tokens // self.capacity.block_tokens for slot in self.slots.values())
        context = sum(slot.known for slot in self._batch)
        if held + self.free != self.capacity.blocks or self.free < 0 or context != self._context:
            raise AssertionError(f"{held} + {self.free} of {self.capacity.blocks} blocks, {context} tokens running")
        if any(not slot.running or self.slots.get(slot.key) is not slot for slot in self._batch):
            raise AssertionError("the batch has an engine request that does not run")

    # ------------------------------------------------------------ inside plan

    def _allocate(self) -> tuple[str, ...]:
        found = []
        for key, slot in self._parked.items():
            if not self._extend(slot, slot.known + slot.request.ahead):
                break
            slot.ready = True
            found.append(key)
        for key in found:
            del self._parked[key]
        return tuple(found)

    def _grow(self) -> tuple[str, ...]:
        """Allocate a block for each request that has filled its last one, oldest first; returns the keys of those
        preempted for it."""
        preempted = []
        for slot in self._short:
            while slot.running and not self._extend(slot, slot.known):
                victim = self._batch.pop()
                self._leave(victim)
                self._release(victim)
                self._resized[victim.key] = victim
                self._preempted.insert(0, victim)
                preempted.append(victim.key)
        self._short = []
        return tuple(preempted)

    def _resume(self) -> tuple[Span, ...]:
        again = []
        for slot in [slot for slot in self._preempted if not slot.held]:
            if not self._extend(slot, slot.known):
                break
            self._preempted.remove(slot)
            self._join(slot)
            again.append(Span(slot.key, 0, slot.known))
        return tuple(again)

    def _chunk(self, again: tuple[Span, ...], most: int | None) -> tuple[Span, ...]:
        budget = self.capacity.chunk_tokens - len(self._batch) - sum(span.stop - 1 for span in again)
        budget = budget if most is None else min(budget, most)
        spans = []
        for slot in self._prefills:
            if budget <= 0 or not self._extend(slot, slot.known):
                break
            stop = min(slot.done + budget, slot.known)
            spans.append(Span(slot.key, slot.done, stop))
            budget -= stop - slot.done
        return tuple(spans)

    def _passes(self) -> int:
        """The most passes until the first request of the batch reaches its end; at least 1."""
        if self._left <= 0:
            self._left = max(min([slot.end - slot.known for slot in self._batch]), 1)
        return self._left

    def _affordable(self, steps: int) -> int:
        """The most passes, up to `steps`, for which the free blocks suffice. The first pass has its blocks already."""
        size = self.capacity.block_tokens
        if len(self._batch) * blocks_for(steps - 1, size) <= self.free:
            return steps
        spares = [slot.held_tokens - slot.known for slot in self._batch]
        low, high = 1, steps
        while low < high:
            middle = (low + high + 1) // 2
            need = sum([blocks_for(middle - 1 - spare, size) for spare in spares if spare < middle - 1])
            low, high = (middle, high) if need <= self.free else (low, middle - 1)
        return low

    # ------------------------------------------------------------ inside finish

    def _advance(self, steps: int, ids: Ids) -> list[Sampled]:
        """Advance each request of the batch by `steps` passes; returns their tokens."""
        tokens: list[Sampled] = []
        ended = 0
        for slot, new in zip(self._batch, ids(self._batch, steps), strict=True):
            slot.known = known = slot.known + steps
            if known < slot.mark and new[-1] > EOS:  # neither EOS nor NO_TOKEN
                tokens.append(Sampled(slot.key, new, None))
                continue
            if known > slot.held_tokens:
                if known - 1 > slot.held_tokens:
                    self._extend(slot, known - 1)
                if known > slot.held_tokens:
                    self._short.append(slot)
            sampled = self._sampled(slot.key, slot, new)
            if sampled.reason is not None:
                ended += 1
                self._remove(slot)
            tokens.append(sampled)
        self._context += steps * len(self._batch)
        self._left -= steps
        if ended:
            for slot in [slot for slot in self._batch if slot.key not in self.slots]:
                self._leave(slot)
            self._batch = [slot for slot in self._batch if slot.running]
        return tokens

    @staticmethod
    def _sampled(key: str, slot: Slot, ids: tuple[int, ...]) -> Sampled:
        token, sampling = ids[-1], slot.request.sampling
        if token == NO_TOKEN:
            return Sampled(key, ids[:-1], "error", INVALID)
        reason = "length" if slot.known >= slot.end else None
        if (token == EOS or sampling.stop_token_ids) and ends_text(token, sampling):
            reason = "stop"
        return Sampled(key, ids, reason)

    def _turn(self, slot: Slot) -> None:
        """Make a decode request that waits for `admit` of a prefill request that stays. `admit` counts its token."""
        del self.slots[slot.key], self._stays[slot.stays]
        self._resized.pop(slot.key, None)
        slot.request = slot.request.as_decode(slot.stays)
        slot.key, slot.stays, slot.ready, slot.known = slot.stays, "", True, slot.known - 1
        self.slots[slot.key] = slot

    def _remove(self, slot: Slot) -> None:
        del self.slots[slot.key]
        self._stays.pop(slot.stays, None)
        self._release(slot)

    # ------------------------------------------------------------ memory and the batch

    def _extend(self, slot: Slot, tokens: int) -> bool:
        """Grow to blocks for `tokens` tokens; False, and no change, when too few are free."""
        if tokens <= slot.held_tokens:
            return True
        size = self.capacity.block_tokens
        blocks = (tokens - slot.held_tokens + size - 1) // size
        if blocks > self.free:
            return False
        self.free -= blocks
        slot.held_tokens += blocks * size
        slot.mark = 0 if slot.request.sampling.stop_token_ids else min(slot.held_tokens + 1, slot.end)
        self._resized[slot.key] = slot
        return True

    def _release(self, slot: Slot) -> None:
        self.free += slot.held_tokens // self.capacity.block_tokens
        slot.held_tokens = 0
        self._resized.pop(slot.key, None)

    def _join(self, slot: Slot) -> None:
        self._admitted += 1
        slot.admitted = self._admitted
        self._enter(slot)

    def _enter(self, slot: Slot) -> None:
        slot.running = True
        insort(self._batch, slot, key=lambda slot: slot.admitted)
        self._context += slot.known
        self._left = 0
        if slot.known > slot.held_tokens:
            self._short.append(slot)

    def _leave(self, slot: Slot) -> None:
        slot.running = False
        self._context -= slot.known
        self._left = 0
