"""The records of a paged engine: the state of an engine request, and the plan of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tetri.cost import Cost
from tetri.engine_request import EngineRequest, Span
from tetri.request import Sampling, Value

EOS = 0  # the only id that ends a text by itself
NO_TOKEN = -1  # in place of a token: the pass computed no valid number


@dataclass(slots=True, eq=False)
class Slot:
    """An engine request. `known`: number of its tokens, sampled ones included. `done`: of a prefill request, KV exists
    for [0, done); a decode request in the batch has KV for all but its last token. `end`: value of `known` at which it
    ends. `held_tokens`: tokens for which it has blocks. `mark`: value of `known` at which it ends or needs a block; 0
    if any token may end it. `held`: excluded from steps (`hold`). `admitted`: a decode request's place in the order of
    admission; 0: not admitted. It is `running` while it is neither held nor preempted."""

    request: EngineRequest
    key: str
    number: int  # in the order of addition
    known: int
    end: int
    done: int = 0
    held_tokens: int = 0
    mark: int = 0
    stays: str = ""  # of a prefill request: its key as a decode request here, when its prefill has ended
    ready: bool = False  # a decode request that has its blocks and waits for `admit`
    admitted: int = 0
    running: bool = False
    held: bool = False


def ends_text(token: int, sampling: Sampling) -> bool:
    """Whether a token ends the text."""
    return (token == EOS and not sampling.ignore_eos) or token in sampling.stop_token_ids


#: (slots, count) -> the `count` tokens that each of them gets, which its `known` does not count yet. Of a prefill
#: request that ends: its first token, and those of its siblings.
Ids = Callable[[Sequence[Slot], int], Iterable[tuple[int, ...]]]


class StepPlan(Value, frozen=True):
    """What the next step runs: `batch`, one token each; `again`, the spans that resumed requests of the batch compute
    again; and `chunk`, the spans of prefill requests.

    `steps`: how many forward passes the step may have. More than 1 only when the batch alone runs; then no request
    reaches its end, and the blocks suffice, before the last pass."""

    cost: Cost
    steps: int
    batch: list[Slot]
    context: int  # tokens of all requests of the batch
    chunk: tuple[Span, ...] = ()
    again: tuple[Span, ...] = ()
    allocated: tuple[str, ...] = ()
    preempted: tuple[str, ...] = ()

    @property
    def idle(self) -> bool:
        """Whether the step computes nothing."""
        return not (self.batch or self.chunk)

    def seconds(self, steps: int) -> float:
        """Duration of the first `steps` passes, by the cost table."""
        if self.again or self.chunk:
            return self.cost.step_s((*self.again, *self.chunk), len(self.batch), self.context)
        return self.cost.decode_run_s(len(self.batch), self.context, steps)
