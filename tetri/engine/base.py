"""The contract between a worker and the engine that runs the model. An engine makes no policy decision: it runs engine
requests in the order in which they were added, treats blocks as opaque bytes, and reports what each step ran.

An *engine request* is one phase of one request on one engine:

prefill  Computes KV for all of `tokens`, in chunks, oldest request first. The step that computes the last of them
         yields one token, and one for each of its `siblings`, and ends the engine request. `export` can read its blocks
         until the next `step` or `cancel`.
         While it is held (`hold`), no step computes any of it; it keeps its blocks and its place in the order.
         One that is to `stay` does not end: the step yields its token under its key, and turns it into a decode request
         that has its blocks, with their KV, and waits for `admit`. It ends as any other if its token ends the text.
decode   Reserves blocks for all of `tokens` (reported by `StepDone.allocated`), receives their KV by `adopt`, and runs
         after `admit`, which passes the token that follows `tokens`. The engine does not compute `tokens` again,
         unless it preempts the engine request; the spans show that. It can be held once it is admitted.
         With `ahead`, it reserves blocks for so many tokens more, and `admit` passes those that came with their KV.
         Once it is admitted, `export` can read its blocks between two steps: they have the KV of all of its tokens but
         the last, unless it is preempted.

A step computes at most `chunk_tokens` positions. Each running decode request gets one token, so prefill never delays
decode by a step. The rest of the budget goes to one chunk of prefill tokens, which may be limited further (`chunk`).
`chunk_tokens` must be larger than the batch, or prefill would make no progress. The chunk may be smaller when a
preempted request is computed again.

When the model computes no valid number for a request (NaN), the step ends that engine request with an error instead of
a token; the others go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from tetri.engine_request import EngineRequest, Phase, Sampled, Span, StepDone
from tetri.instance import Capacity, Fingerprint

__all__ = [
    "Engine",
    "EngineError",
    "HiddenStates",
    "EngineRequest",
    "Phase",
    "Sampled",
    "Span",
    "StepDone",
    "HiddenStateHook",
    "SupportsHiddenStates",
    "check_budget",
]


class EngineError(ValueError):
    """An engine request, or the engine's configuration, cannot run. The message is one line and says why."""


def check_budget(chunk_tokens: int, max_batch: int) -> None:
    """Raises EngineError unless a step with a full decode batch has tokens left for prefill."""
    if chunk_tokens <= max_batch:
        raise EngineError(
            f"chunk_tokens ({chunk_tokens}) is the token budget of a step: it must be larger than max_batch "
            f"({max_batch}), or a full batch would leave nothing for prefill"
        )


class Engine(Protocol):
    """What a worker needs of an engine. `fingerprint` decides KV compatibility between engines."""

    fingerprint: Fingerprint
    capacity: Capacity

    def add(self, request: EngineRequest) -> None:
        """Add an engine request. Raises EngineError when it can never run."""

    def cancel(self, key: str) -> None:
        """End an engine request in any state and free its blocks before the next step. An unknown key is no error. The
        decode key of a prefill that is to stay takes that back: the prefill ends as any other."""

    def admit(self, key: str, token: int, further: Sequence[int] = ()) -> None:
        """Admit a decode request to the running batch, after all of its blocks were adopted. `token` follows its
        `tokens`, and the `further` ones, at most its `ahead`, follow that one: the KV of all but the last was
        adopted too."""

    def hold(self, key: str, held: bool) -> None:
        """Exclude a request from the next steps, or include it again. It keeps its blocks and its place. An unknown key
        is no error. Raises EngineError for a decode request that is not admitted."""

    def stay(self, key: str, decode_key: str) -> None:
        """Let a prefill request without siblings go on here, as decode request `decode_key`, when its prefill ends.
        Raises EngineError when it cannot, or when a request has that key."""

    def step(self, most: int = 1, chunk: int | None = None) -> StepDone:
        """Run one forward pass, or an idle pass that only allocates. Blocks until it is done. When only decode
        requests run, the engine may run up to `most` passes; it stops after a pass in which a request ends and before
        one that lacks memory. The number of passes does not change the tokens. `chunk`: most prefill tokens; None: as
        many as the budget has left."""

    def export(self, key: str, start: int, stop: int, into: Sequence[memoryview]) -> None:
        """Copy blocks [start, stop) of an engine request into buffers of `block_bytes` each."""

    def adopt(self, key: str, start: int, blocks: Sequence[memoryview]) -> None:
        """Copy `blocks` into blocks [start, start + len(blocks)) of a decode request that waits for admission. Raises
        EngineError when it does not."""

    def close(self) -> None:
        """Free all resources."""


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """`rows`: float32 [n, layers, hidden]. Row i belongs to the last token of engine request `keys[i]`, when its
    request had `outputs[i]` output tokens, including those of earlier attempts."""

    keys: tuple[str, ...]
    outputs: tuple[int, ...]
    rows: Any


class HiddenStateHook(Protocol):
    """Collects hidden states from the steps of an engine. `hidden`: size of a state."""

    hidden: int

    def collect(self) -> HiddenStates | None:
        """The states of the last step, once; None when there are none."""

    def close(self) -> None:
        """Stop collecting."""


@runtime_checkable
class SupportsHiddenStates(Protocol):
    """An engine that can also return the hidden states that its steps compute anyway."""

    def hook_hidden_states(self, layers: Sequence[int], every: int) -> HiddenStateHook:
        """From the next step on, keep the states after each of the given numbers of layers (ascending): of a prefill
        request in the step that ends it, and of a decode request when its request has a multiple of `every` output
        tokens, also in the step that ends it. Raises EngineError when the engine cannot provide states."""
