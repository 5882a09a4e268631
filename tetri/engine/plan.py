"""What a paged engine knows of a leg, and what it is about to run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tetri.cost import Cost
from tetri.engine_request import EngineRequest, Span

EOS = 0  # the one id that ends a sequence

Ids = Callable[[str, int], tuple[int, ...]]  # (key, how many) -> the tokens that this leg got in the step


@dataclass(slots=True, eq=False)
class Slot:
    """A leg in the engine. `known`: its tokens, those sampled included; KV exists for [0, done). `end`: it ends when
    so many are known. `buffer`: tokens for which it has blocks."""

    request: EngineRequest
    key: str
    number: int  # in the order of addition
    known: int
    end: int
    done: int = 0
    held_tokens: int = 0
    ready: bool = False  # a decode leg that has its blocks and waits to be admitted
    running: bool = False
    held: bool = False


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What the next step runs: `batch`, one token each and `again` of them after a preemption, and `chunk`.

    `steps`: how many forward passes it may advance in one go. More than 1 only when nothing but the batch runs and
    nothing else happened; then nobody ends and memory does not run out before the last of them."""

    cost: Cost
    steps: int
    batch: list[Slot]
    context: int  # tokens of the batch, all together
    chunk: tuple[Span, ...] = ()
    again: tuple[Span, ...] = ()
    allocated: tuple[str, ...] = ()
    preempted: tuple[str, ...] = ()

    @property
    def idle(self) -> bool:
        """Nothing is computed."""
        return not (self.batch or self.chunk)

    def seconds(self, steps: int) -> float:
        """How long the first so many passes take."""
        if self.again or self.chunk:
            return self.cost.step_s((*self.again, *self.chunk), len(self.batch), self.context)
        return self.cost.decode_run_s(len(self.batch), self.context, steps)
