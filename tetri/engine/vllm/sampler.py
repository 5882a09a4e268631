"""Samples the next token from the logits, the sampling parameters, the tokens and the seed of a request.

All sampling is done here and none in vLLM, for two reasons. First, a request that moves to another engine must get the
same tokens there. The noise is a hash of (seed, absolute position, token id), so no generator state has to move.
Second, output tokens that become part of a prompt (the first output token, or the output of an earlier attempt) still
count as output: `output_from` is the index at which output begins.

Order: penalties, min_tokens, temperature, min-p, top-k, top-p, Gumbel noise, argmax.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch

from tetri.request import Sampling

# Keys in vLLM's SamplingParams.extra_args: what makes the RowSampler, what is called for a row without a valid number.
SAMPLER, INVALID_ROW = "tetri_sampler", "tetri_invalid_row"

# At temperatures below this, sampling equals argmax; the limit also avoids overflow of logits / temperature.
GREEDY_BELOW = 1e-5

_FORBIDDEN = float("-inf")
_MASK64 = 0xFFFFFFFFFFFFFFFF


def stream_key(seed: int, position: int) -> int:
    """The 32-bit noise key of one token position of one request: high half of splitmix64 of seed and position."""
    state = (seed * 0x9E3779B97F4A7C15 + position * 0xD1B54A32D192ED03 + 0x8CB92BA72F3D8DD7) & _MASK64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
    return (state ^ (state >> 31)) >> 32


def gumbel(seed: int, position: int, ids: torch.Tensor) -> torch.Tensor:
    """Gumbel noise for token `ids` (int32 [n]) at one absolute position: float32 [n].

    A counter-based hash, not a generator: the noise of a token depends neither on the other candidates nor on the
    version of torch. It uses 32-bit integers in place, because it runs over the whole vocabulary for every token.
    """
    key = stream_key(seed, position)
    bits = ids ^ (key - (1 << 32) if key >= 1 << 31 else key)  # as a signed number
    for shift, multiplier in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        bits.bitwise_xor_((bits >> shift).bitwise_and_((1 << (32 - shift)) - 1)).mul_(multiplier)
    bits.bitwise_xor_((bits >> 15).bitwise_and_((1 << 17) - 1)).bitwise_and_(0x7FFFFFFF)
    # u in (0, 1). -log1p(-u) is precise for small u, which gives the largest noise and so the likely winners.
    u = bits.to(torch.float32).add_(0.5).mul_(2.0**-31).clamp_(max=1.0 - 2.0**-24)
    return u.neg_().log1p_().neg_().log_().neg_()


def penalize(logits: torch.Tensor, seen: torch.Tensor, counts: torch.Tensor, sampling: Sampling) -> None:
    """Apply the penalties to one row of float32 logits [vocab], in place. `seen`: bool [vocab], token is in prompt or
    output; `counts`: float32 [vocab], occurrences in the output."""
    if (repetition := sampling.repetition_penalty) != 1.0:
        logits.copy_(torch.where(seen, torch.where(logits > 0, logits / repetition, logits * repetition), logits))
    if sampling.frequency_penalty != 0.0:
        logits.sub_(counts, alpha=sampling.frequency_penalty)
    if sampling.presence_penalty != 0.0:
        logits.sub_((counts > 0).to(logits.dtype), alpha=sampling.presence_penalty)


def candidates(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """The candidates of one row of logits [vocab] after min-p, top-k and top-p: (ids int32 [n], values float32 [n]),
    n >= 1. Values are logits / temperature, shifted so that the largest is 0."""
    values = (logits - logits.max()).div_(sampling.temperature)
    ids = _all_ids(values.numel())
    if sampling.min_p > 0.0:
        ids, values = _pick(ids, values, (values >= math.log(sampling.min_p)).nonzero().squeeze(1))
    if 0 < sampling.top_k < values.numel():
        ids, values = _pick(ids, values, values.topk(sampling.top_k).indices)
    if sampling.top_p < 1.0:
        ids, values = _pick(ids, values, nucleus(values, sampling.top_p))
    return ids, values


def nucleus(values: torch.Tensor, top_p: float) -> torch.Tensor:
    """Indices into `values` (logits, [n]) of the smallest set of most likely entries with probability mass `top_p`,
    most likely first. Sorts only as many entries as needed, which are few for most texts."""
    total = torch.logsumexp(values, 0)
    size = min(128, values.numel())
    while True:
        head, indices = values.topk(size)
        mass = torch.exp(head - total)
        before = mass.cumsum(0) - mass
        keep = max(1, int((before < top_p).sum()))
        if keep < size or size == values.numel():
            return indices[:keep]
        size = min(16 * size, values.numel())


def _pick(ids: torch.Tensor, values: torch.Tensor, where: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return ids[where], values[where]


@lru_cache(maxsize=4)
def _all_ids(vocab: int) -> torch.Tensor:
    return torch.arange(vocab, dtype=torch.int32)


def draw(logits: torch.Tensor, sampling: Sampling, position: int) -> int:
    """Sample one token id from one row of float32 logits [vocab] for an absolute position, by the Gumbel-max rule.
    Raises ValueError without a seed."""
    if sampling.seed is None:
        raise ValueError("sampling a token needs a seed")
    ids, values = candidates(logits, sampling)
    score = gumbel(sampling.seed, position, ids).add_(values)
    return int(ids[(score == score.max()).nonzero()[0, 0]])  # several times as fast as argmax


class RowSampler:
    """Samples for one request. `tokens`: the prompt in vLLM's sense; `output_from`: index in it at which output begins;
    `stop_ids`: ids that end a text; `vocab`: size of the vocabulary."""

    def __init__(
        self, sampling: Sampling, tokens: Sequence[int], output_from: int, stop_ids: Sequence[int], vocab: int
    ) -> None:
        self.sampling = sampling
        self._length = len(tokens)
        self._known_outputs = len(tokens) - output_from
        self._draws = sampling.temperature >= GREEDY_BELOW
        self._min_tokens = 0 if sampling.ignore_eos or not stop_ids else sampling.min_tokens
        self._stop_ids = torch.tensor(list(stop_ids), dtype=torch.int64)
        self._penalizes = (
            sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0
        )
        if self._penalizes:
            everything = torch.tensor(list(tokens), dtype=torch.int64)
            self._seen = torch.zeros(vocab, dtype=torch.bool)
            self._seen[everything] = True
            self._counts = torch.bincount(everything[output_from:], minlength=vocab).to(torch.float32)
            self._counted = 0

    @property
    def idle(self) -> bool:
        """Whether plain argmax is correct at every position, so that `apply` is not needed."""
        return not (self._draws or self._penalizes or self._min_tokens > self._known_outputs)

    def apply(self, logits: torch.Tensor, outputs: Sequence[int]) -> None:
        """Change one row of float32 logits [vocab] in place so that its argmax is the token that follows `tokens` and
        `outputs` (tokens of this engine). A sampled token is the row's only finite entry."""
        if self._penalizes:
            self._count(outputs)
            penalize(logits, self._seen, self._counts, self.sampling)
        if self._known_outputs + len(outputs) < self._min_tokens:
            logits[self._stop_ids] = _FORBIDDEN
        if self._draws:
            token = draw(logits, self.sampling, self._length + len(outputs))
            logits.fill_(_FORBIDDEN)
            logits[token] = 0.0

    def _count(self, outputs: Sequence[int]) -> None:
        for token in outputs[self._counted :]:
            self._seen[token] = True
            self._counts[token] += 1.0
        self._counted = len(outputs)


def invalid_rows(logits: torch.Tensor) -> list[int]:
    """The rows of logits [rows, vocab] from which no token can be chosen: those with a NaN or +inf, or all -inf. The
    largest value of a row shows each of them, and costs as much as an argmax."""
    bad = torch.isfinite(logits.amax(dim=-1)).logical_not_()
    return [int(row) for row in bad.nonzero().squeeze(1)]


def vllm_params(
    sampling: Sampling,
    output_from: int,
    most: int,
    stop_ids: Sequence[int],
    vocab: int,
    invalid: Callable[[], object],
) -> Any:
    """vLLM's SamplingParams for a request with up to `most` more tokens: its end conditions and its RowSampler. They
    are greedy, because the argmax is the token that the RowSampler chose. `invalid` is called inside a step that
    computes no valid number for the request."""
    from vllm.sampling_params import SamplingParams

    return SamplingParams(
        temperature=0.0,
        max_tokens=most,
        stop_token_ids=[] if sampling.ignore_eos else list(stop_ids),
        detokenize=False,
        extra_args={
            SAMPLER: partial(RowSampler, sampling, output_from=output_from, stop_ids=stop_ids, vocab=vocab),
            INVALID_ROW: invalid,
        },
    )
