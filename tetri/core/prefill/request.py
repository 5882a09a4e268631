"""One attempt of one request on the prefill side."""

from __future__ import annotations

from dataclasses import dataclass

from tetri.core.kvflow import KVOutflow
from tetri.policy.length import end_of, heavy
from tetri.policy.rules import Rules
from tetri.policy.views import Need, QueuedPrompt
from tetri.request import Capacity, LengthRange, Receipt, Sampling, Stage, blocks_for
from tetri.wire.messages import End


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
