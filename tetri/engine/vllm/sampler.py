"""Samples the next token from the logits, the sampling parameters, the tokens and the seed of a request.

All sampling is done here and none in vLLM, for two reasons. First, a request that moves to another engine must get the
same tokens there. The noise is a hash of (seed, absolute position, token id), so no generator state has to move.
Second, output tokens that become part of a prompt (the first output token, or the output of an earlier attempt) still
count as output: `output_from` is the index at which output begins.

Order, as in vLLM: min_tokens, logit_bias, penalties, temperature, min-p, top-k, top-p; then Gumbel noise and argmax.
Log probabilities are those of the model's own logits, before all of this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch

from tetri.request import Sampling, Token, TokenLogprob

# Keys in vLLM's SamplingParams.extra_args: what makes the RowSampler, and what is told of its tokens.
SAMPLER, REPORT = "tetri_sampler", "tetri_report"
Report = Callable[[tuple[Token, ...]], object]

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


def draw(logits: torch.Tensor, sampling: Sampling, position: int, seeds: Sequence[int]) -> list[int]:
    """Sample a token id for each seed from one row of float32 logits [vocab] for an absolute position, by the
    Gumbel-max rule."""
    ids, values = candidates(logits, sampling)
    scores = (gumbel(seed, position, ids).add_(values) for seed in seeds)
    return [int(ids[(score == score.max()).nonzero()[0, 0]]) for score in scores]  # several times as fast as argmax


class LogProbabilities:
    """The log probabilities of one row of float32 logits [vocab], with the `most` most likely tokens."""

    def __init__(self, logits: torch.Tensor, most: int) -> None:
        self._all = logits.log_softmax(-1)
        values, ids = self._all.topk(most)
        self._top = dict(zip(ids.tolist(), values.tolist(), strict=True))

    def of(self, token: int) -> TokenLogprob:
        """A token with its log probability."""
        return TokenLogprob(token, float(self._all[token]), self._top)


class RowSampler:
    """Samples for one request. `tokens`: the prompt in vLLM's sense; `output_from`: index in it at which output begins;
    `stop_ids`: ids that end a text, whether or not the request ignores them; `vocab`: size of the vocabulary;
    `siblings`: seeds for which a token is drawn too. Raises ValueError when it would have to draw without a seed."""

    def __init__(
        self,
        sampling: Sampling,
        tokens: Sequence[int],
        output_from: int,
        stop_ids: Sequence[int],
        vocab: int,
        siblings: Sequence[int] = (),
    ) -> None:
        self.sampling = sampling
        self._length = len(tokens)
        self._known_outputs = len(tokens) - output_from
        self._draws = sampling.temperature >= GREEDY_BELOW
        if self._draws and sampling.seed is None:
            raise ValueError("sampling a token needs a seed")
        self._seeds = (sampling.seed or 0, *siblings)
        self._reports = sampling.logprobs is not None or bool(siblings)
        self._stop_ids = torch.tensor([*stop_ids, *sampling.stop_token_ids], dtype=torch.int64)
        self._min_tokens = sampling.min_tokens if len(self._stop_ids) else 0
        self._biased = torch.tensor(list(sampling.logit_bias), dtype=torch.int64)
        self._biases = torch.tensor(list(sampling.logit_bias.values()), dtype=torch.float32)
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
        changes = self._penalizes or self.sampling.logit_bias or self._min_tokens > self._known_outputs
        return not (self._draws or self._reports or changes)

    def apply(self, logits: torch.Tensor, outputs: Sequence[int]) -> tuple[Token, ...] | None:
        """Change one row of float32 logits [vocab] in place so that its argmax is the token that follows `tokens` and
        `outputs` (tokens of this engine). Returns this token and that of each sibling, with log probabilities if they
        are asked for; None if nothing but the argmax is wanted. A returned token is the row's only finite entry."""
        sampling = self.sampling
        raw = None if sampling.logprobs is None else LogProbabilities(logits, sampling.logprobs)
        self._change(logits, outputs)
        if not (self._draws or self._reports):
            return None
        if self._draws:
            ids = draw(logits, sampling, self._length + len(outputs), self._seeds)
        else:
            ids = [int(logits.argmax())] * len(self._seeds)
        logits.fill_(_FORBIDDEN)
        logits[ids[0]] = 0.0
        return tuple(ids) if raw is None else tuple(map(raw.of, ids))

    def _change(self, logits: torch.Tensor, outputs: Sequence[int]) -> None:
        """Apply min_tokens, logit_bias and penalties."""
        if self._known_outputs + len(outputs) < self._min_tokens:
            logits[self._stop_ids] = _FORBIDDEN
        if len(self._biased):
            logits[self._biased] += self._biases
        if self._penalizes:
            self._count(outputs)
            penalize(logits, self._seen, self._counts, self.sampling)

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
    report: Report,
    siblings: Sequence[int] = (),
) -> Any:
    """vLLM's SamplingParams for a request with up to `most` more tokens: its end conditions and its RowSampler. They
    are greedy, because the argmax is the token that the RowSampler chose. `report` is called inside a step: with the
    tokens that the RowSampler returned, or with none when the model computed no valid number for the request."""
    from vllm.sampling_params import SamplingParams

    sampler = partial(RowSampler, sampling, output_from=output_from, stop_ids=stop_ids, vocab=vocab, siblings=siblings)
    return SamplingParams(
        temperature=0.0,
        max_tokens=most,
        stop_token_ids=[*sampling.stop_token_ids, *(() if sampling.ignore_eos else stop_ids)],
        detokenize=False,
        extra_args={SAMPLER: sampler, REPORT: report},
    )
