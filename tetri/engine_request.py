"""A leg, and what a step of an engine says of it: the words that cores, policies and engines share.

A *leg* is one phase of one request on one engine (tetri/engine/base.py tells its life).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tetri.request import LengthDistribution, Record, Sampling

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """`tokens` is the prompt and the output of earlier attempts; `output_from` the index in it at which output
    begins (penalties, min_tokens and max_tokens count from there). `key` is unique per engine."""

    key: str
    phase: Phase
    tokens: tuple[int, ...]
    output_from: int
    sampling: Sampling


# Records, for they are made by the million: a dataclass takes six times as long.


class Span(Record, frozen=True, gc=False):
    """Token positions [start, stop) of one leg, computed in one step."""

    key: str
    start: int
    stop: int


class Sampled(Record, frozen=True, gc=False):
    """The new tokens of one leg, one per forward pass. `reason` is None, or why the leg ended with the last of them:
    "stop" (end of sequence) or "length"."""

    key: str
    ids: tuple[int, ...]
    reason: str | None

    @property
    def token(self) -> int:
        """The last one; a prefill leg has no other."""
        return self.ids[-1]


class HiddenStateEstimate(Record, frozen=True, gc=False):
    """What the model's own hidden state says of a leg: the `distribution` of how many output tokens follow after the `outputs`
    that its request had when the state was computed, those of earlier attempts included."""

    key: str
    outputs: int
    distribution: LengthDistribution


@dataclass(frozen=True, slots=True)
class StepDone:
    """What one step really did. `held`: the number of blocks, after the step, of each leg that is still there and whose
    number changed since the last one (0: preempted); who is not named holds what was said last.

    A decode batch whose members stay the same may advance by several forward passes in one go: `steps` of them, each
    running leg then has `steps` tokens and a span of as many positions. With prefill spans in it, `steps` is 1."""

    spans: tuple[Span, ...] = ()
    tokens: tuple[Sampled, ...] = ()
    allocated: tuple[str, ...] = ()  # decode legs whose blocks are now there, ready for `adopt`
    preempted: tuple[str, ...] = ()
    held: tuple[tuple[str, int], ...] = ()
    steps: int = 1
    estimates: tuple[HiddenStateEstimate, ...] = ()  # prefill legs that have ended; decode legs every so many tokens
