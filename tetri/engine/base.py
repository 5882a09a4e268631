"""The contract between a worker and whatever runs the model. An engine decides nothing: legs are run in the
order in which they were added, blocks are opaque bytes, and every step reports what really ran.

A *leg* is one phase of one request on one engine:

prefill  computes KV for all of `tokens`, in chunks of at most `chunk_tokens` per step together with the other
         prefill legs, oldest first; the step that computes the last of them yields one token, which ends the leg.
         Its blocks stay readable by `export` until the next `step` or `cancel`.
decode   reserves blocks for all of `tokens` (told by `StepDone.allocated`), takes their KV by `adopt`, and runs
         only after `admit`, which names the token that follows `tokens`. Nothing of `tokens` is computed again,
         unless the engine preempts the leg; then the spans show it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tetri.leg import Leg, Phase, Sampled, Span, StepDone
from tetri.request import Capacity, Fingerprint

__all__ = ["Engine", "EngineError", "Leg", "Phase", "Sampled", "Span", "StepDone"]


class EngineError(ValueError):
    """One leg, or the engine's configuration, cannot be run; one line that says why."""


class Engine(Protocol):
    fingerprint: Fingerprint
    capacity: Capacity

    def add(self, leg: Leg) -> None:
        """Raises EngineError when this leg can never run."""

    def cancel(self, key: str) -> None:
        """End a leg in any state and free its blocks before the next step; an unknown key is no error."""

    def admit(self, key: str, token: int) -> None:
        """Let a decode leg, all of whose blocks were adopted, into the running batch."""

    def step(self) -> StepDone:
        """One forward pass, or an idle pass that only allocates. Blocks until done."""

    def export(self, key: str, start: int, stop: int, into: Sequence[memoryview]) -> None:
        """Copy the leg's blocks [start, stop) out, one buffer of `block_bytes` each."""

    def adopt(self, key: str, start: int, blocks: Sequence[memoryview]) -> None:
        """Copy bytes into the leg's blocks [start, start + len(blocks))."""

    def close(self) -> None: ...
