"""The contract between a worker and whatever runs the model. An engine decides nothing: legs are run in the
order in which they were added, blocks are opaque bytes, and every step reports what really ran.

A *leg* is one phase of one request on one engine:

prefill  computes KV for all of `tokens`, in chunks, oldest first; the step that computes the last of them yields one
         token, which ends the leg. Its blocks stay readable by `export` until the next `step` or `cancel`. While it is
         held (`hold`) no step computes anything of it; it keeps its blocks and its place.
decode   reserves blocks for all of `tokens` (told by `StepDone.allocated`), takes their KV by `adopt`, and runs
         only after `admit`, which names the token that follows `tokens`. Nothing of `tokens` is computed again,
         unless the engine preempts the leg; then the spans show it.

A step computes at most `chunk_tokens` positions. The running decode legs come first, with one token each: no prefill
leg ever delays them by a step. What they leave goes to one chunk of the prefill legs. `chunk_tokens` must be larger
than the batch, or no prefill leg would go on. When a preempted leg is computed again, the chunk may be shorter than
that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from tetri.engine_request import EngineRequest, Phase, Sampled, Span, StepDone
from tetri.request import Capacity, Fingerprint

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
]


class EngineError(ValueError):
    """One leg, or the engine's configuration, cannot be run; one line that says why."""


class Engine(Protocol):
    fingerprint: Fingerprint
    capacity: Capacity

    def add(self, request: EngineRequest) -> None:
        """Raises EngineError when this leg can never run."""

    def cancel(self, key: str) -> None:
        """End a leg in any state and free its blocks before the next step; an unknown key is no error."""

    def admit(self, key: str, token: int) -> None:
        """Let a decode leg, all of whose blocks were adopted, into the running batch."""

    def hold(self, key: str, held: bool) -> None:
        """Keep a prefill leg out of the coming steps, or let it in again; an unknown key is no error. Raises
        EngineError for a decode leg."""

    def step(self, most: int = 1) -> StepDone:
        """One forward pass, or an idle pass that only allocates. Blocks until done. When nothing but decode legs run,
        it may be up to `most` passes: never past one in which a leg ends or that memory does not suffice for. The
        tokens are the same however many there are."""

    def export(self, key: str, start: int, stop: int, into: Sequence[memoryview]) -> None:
        """Copy the leg's blocks [start, stop) out, one buffer of `block_bytes` each."""

    def adopt(self, key: str, start: int, blocks: Sequence[memoryview]) -> None:
        """Copy bytes into the blocks [start, start + len(blocks)) of a decode leg that is not yet admitted. Raises
        EngineError when there is none (any more)."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """`rows` float32 [n, layers, hidden]: row i is of the last token of leg `keys[i]` when its request had `outputs[i]`
    output tokens, those of earlier attempts included."""

    keys: tuple[str, ...]
    outputs: tuple[int, ...]
    rows: Any


class HiddenStateHook(Protocol):
    hidden: int  # numbers in a state

    def collect(self) -> HiddenStates | None:
        """What the last step took, if this was not asked since; None: nothing."""

    def close(self) -> None:
        """Take no more."""


@runtime_checkable
class SupportsHiddenStates(Protocol):
    """What an engine may do besides, when there is a model in it: hand out hidden states that its steps compute
    anyway."""

    def hook_hidden_states(self, layers: Sequence[int], every: int) -> HiddenStateHook:
        """From the next step on keep the states behind the first so many layers, ascending: of prefill legs in the
        step that ends them, of decode legs when their request has a multiple of `every` output tokens; also of a leg
        that ends in that step. Raises EngineError, one line, where none would come."""
