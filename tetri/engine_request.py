"""Engine requests and the results of engine steps: the types that cores, policies and engines share.

An engine request is one phase of one request on one engine. tetri/engine/base.py describes its lifecycle.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Literal, TypeVar

from tetri.request import LengthDistribution, Record, Sampling, Token, Value, token_ids

Phase = Literal["prefill", "decode"]

INVALID = "the model computed no valid number for this request (NaN logits)"


class EngineRequest(Value, frozen=True):
    """One phase of one request on one engine.

    key           unique per engine
    tokens        token ids of the prompt and of the output of earlier attempts
    output_from   index in `tokens` where output begins; penalties, min_tokens and max_tokens count from there
    siblings      of a prefill: the key and the seed of each further choice. The step that ends the prefill draws the
                  first token of each of them too, from the same logits, and yields a Sampled with its key
    ahead         of a decode request: most tokens after `tokens` whose KV may come too, because another engine goes on
                  computing them. `admit` says which they are
    """

    key: str
    phase: Phase
    tokens: tuple[int, ...]
    output_from: int
    sampling: Sampling
    siblings: tuple[tuple[str, int], ...] = ()
    ahead: int = 0

    def as_decode(self, key: str) -> EngineRequest:
        """Return the decode request that a prefill request becomes when it stays."""
        return EngineRequest(key, "decode", self.tokens, self.output_from, self.sampling)


# Records, because millions of them are made: a dataclass takes six times as long to create.


class Span(Record, frozen=True, gc=False):
    """Token positions [start, stop) of one engine request, computed in one step."""

    key: str
    start: int
    stop: int


class Sampled(Record, frozen=True, gc=False):
    """The new tokens of one engine request, or of a sibling of one, one per forward pass. With log probabilities if its
    Sampling asks for them. `reason`: why it ended with the last of them, "stop" (end of sequence, or a stop token id)
    or "length"; None if it continues. "error": the pass after them gave no token, and `error` says why."""

    key: str
    ids: tuple[Token, ...]
    reason: str | None
    error: str | None = None

    @property
    def token(self) -> int:
        """The id of the last token; the only one of a prefill request."""
        return token_ids(self.ids[-1:])[0]


class HiddenStateEstimate(Record, frozen=True, gc=False):
    """Length prediction from the model's hidden state: the `distribution` of the number of output tokens that follow.
    `outputs`: output tokens of the request when the state was computed, those of earlier attempts included."""

    key: str
    outputs: int
    distribution: LengthDistribution


class StepDone(Record, frozen=True):
    """The result of one engine step.

    spans       what was computed, except for the one position of a decode request for each of its tokens: chunks of
                prompts, and preempted decode requests computed again
    tokens      new output tokens
    allocated   decode requests whose KV blocks are allocated now, ready for `adopt`
    preempted   requests that lost their blocks
    held        KV blocks after the step, of each request whose number has changed since the last step (0: preempted).
                Not of a prefill request that has ended, nor of the decode request that one has become
    steps       forward passes. A decode batch may run several in one go; each request then has `steps` tokens. 1 with
                spans
    estimates   of prefill requests that have ended, and of decode requests every so many tokens
    """

    spans: tuple[Span, ...] = ()
    tokens: tuple[Sampled, ...] = ()
    allocated: tuple[str, ...] = ()
    preempted: tuple[str, ...] = ()
    held: tuple[tuple[str, int], ...] = ()
    steps: int = 1
    estimates: tuple[HiddenStateEstimate, ...] = ()

    def parts(self, keys: Container[str]) -> tuple[StepDone, StepDone]:
        """Return the result for the requests in `keys`, and that for all others, each with all of `allocated` and
        `held`."""
        spans, other_spans = _parted(self.spans, keys)
        tokens, other_tokens = _parted(self.tokens, keys)
        estimates, other_estimates = _parted(self.estimates, keys)
        preempted = others = self.preempted
        if preempted:
            preempted = tuple([key for key in self.preempted if key in keys])
            others = tuple([key for key in self.preempted if key not in keys])
        return (
            StepDone(spans, tokens, self.allocated, preempted, self.held, self.steps, estimates),
            StepDone(other_spans, other_tokens, self.allocated, others, self.held, self.steps, other_estimates),
        )


Keyed = TypeVar("Keyed", Span, Sampled, HiddenStateEstimate)


def _parted(all_of: tuple[Keyed, ...], keys: Container[str]) -> tuple[tuple[Keyed, ...], tuple[Keyed, ...]]:
    """Those with a key in `keys`, and the others. Mostly there are only others."""
    found = [each for each in all_of if each.key in keys] if all_of else ()
    if len(found) == len(all_of):
        return all_of, ()
    return (tuple(found), tuple([each for each in all_of if each.key not in keys])) if found else ((), all_of)
