"""Scores predictors on held-out texts, beside baselines that need no predictor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tetri.predict.examples import Texts, positions
from tetri.predict.lengths import Length, prompt_key
from tetri.predict.model import Loaded
from tetri.predict.scores import GRANULARITIES, Doubles, Ints, ceiling, guessed, quantiles, scores
from tetri.request import LengthDistribution

BATCH = 32
FEWEST = 30  # with fewer other texts, the baselines are fitted to the judged texts by cross-validation
FOLDS = 5  # of that cross-validation
BOUND = 0.9  # share of the texts that should end below the conformal bound


@dataclass(frozen=True)
class Judged:
    """The predictions for the `lengths` that are scored.

    distribution  by kind: length distributions [n, buckets] of the whole output of each text
    later         by known output tokens: (indices into `lengths`, distributions of the remaining tokens)
    width, limit  tokens per bucket; tokens at which a text was cut off
    """

    lengths: list[Length]
    distribution: dict[str, Doubles]
    later: dict[int, tuple[Ints, Doubles]]
    width: int
    limit: int

    @property
    def tokens(self) -> Ints:
        """The true lengths, int64 [n]."""
        return np.array([length.tokens for length in self.lengths])


def judge(
    predictors: Mapping[str, Loaded], texts: Texts, lengths: Sequence[Length], report_progress: Callable[[str], None]
) -> Judged:
    """Predict all `lengths` with each of `predictors` (by kind). Raises PredictError."""
    distribution: dict[str, Doubles] = {}
    later: dict[int, tuple[Ints, Doubles]] = {}
    width = next(iter(predictors.values())).card.width
    for kind, predictor in predictors.items():
        report_progress(f"{kind}: {len(lengths)} prompts")
        if kind == "hidden":
            distribution[kind], later = estimates_of(predictor, texts, lengths)
        else:
            distribution[kind] = classified(predictor, [length.prompt for length in lengths])
    if len(distribution) == 2:
        distribution["both"] = together(distribution["classifier"], distribution["hidden"])
    return Judged(list(lengths), distribution, later, width, texts.limit)


def classified(predictor: Loaded, prompts: Sequence[str]) -> Doubles:
    """The classifier's distributions [n, buckets], in the order of `prompts`."""
    order = sorted(range(len(prompts)), key=lambda at: len(prompts[at]))
    found: dict[int, LengthDistribution] = {}
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        found |= zip(batch, predictor.classify([prompts[at] for at in batch]), strict=True)
    return np.array([found[at].shares for at in range(len(prompts))])


def estimates_of(
    predictor: Loaded, texts: Texts, lengths: Sequence[Length]
) -> tuple[Doubles, dict[int, tuple[Ints, Doubles]]]:
    """(distributions at the prompts' ends, distributions at later positions by known output tokens)."""
    by_known: dict[int, list[tuple[int, Any]]] = {}
    for number, known, state in positions(texts, lengths, predictor.layer):
        by_known.setdefault(known, []).append((number, state))
    found = {}
    for known, rows in sorted(by_known.items()):
        states = np.array([state for _, state in rows], np.float32)
        distribution = np.array([one.shares for one in predictor.estimate(states, [known] * len(rows))])
        found[known] = np.array([number for number, _ in rows]), distribution
    return found.pop(0)[1], found


def together(one: Doubles, other: Doubles) -> Doubles:
    """The normalised geometric mean of two sets of distributions [n, buckets]."""
    product = np.sqrt(np.maximum(one, 1e-12) * np.maximum(other, 1e-12))
    return np.asarray(product / product.sum(axis=1, keepdims=True))


def report(judged: Judged, others: Sequence[Length], predictors: Mapping[str, Loaded]) -> dict[str, Any]:
    """The scores of every kind and of the baselines, as JSON data. The scores at the top level are those of the best
    kind: hidden if there is one, else classifier.

    The baselines are fitted to `others`, texts that are not judged; if `others` has fewer than FEWEST texts, to the
    judged texts by cross-validation."""
    tokens, kinds = judged.tokens, list(judged.distribution)
    by_kind = {kind: scores(of, tokens, judged.width, judged.limit) for kind, of in judged.distribution.items()}
    for kind, predictor in predictors.items():
        by_kind[kind]["bound"] = _bound(judged, kind, predictor)
    lead = "hidden" if "hidden" in kinds else kinds[0]
    made: dict[str, Any] = {**by_kind[lead], "kind": lead, **_baselines(judged, others), "kinds": by_kind}
    if "hidden" in predictors:
        made["later"] = {str(known): _later(judged, known) for known in judged.later}
    return made


def ceiling_of(texts: Texts) -> dict[str, Any]:
    """scores.ceiling of the prompts with several texts; {} if there are none."""
    samples: dict[str, list[int]] = {}
    for length in texts.lengths:
        samples.setdefault(prompt_key(length.prompt), []).append(length.tokens)
    return ceiling(samples, texts.limit)


def _baselines(judged: Judged, others: Sequence[Length]) -> dict[str, Any]:
    """Scores of each baseline. No text is guessed from itself."""
    lengths, tokens, count = judged.lengths, judged.tokens, len(judged.lengths)
    parts = [(np.arange(count), list(others))]
    if len(others) < FEWEST:
        fold = np.arange(count) % min(FOLDS, count)
        all_parts = [(np.flatnonzero(fold == one), np.flatnonzero(fold != one)) for one in range(min(FOLDS, count))]
        parts = [(mine, [lengths[at] for at in rest] or list(lengths)) for mine, rest in all_parts]
    guesses = {name: np.zeros((count, 1 + len(GRANULARITIES))) for name in ("majority", "by_source", "by_length")}
    for mine, rest in parts:
        known = np.array([length.tokens for length in rest])
        sources = np.array([length.source for length in rest])
        guesses["majority"][mine] = _best(known, judged.limit)
        for at in mine:
            same = known[sources == lengths[at].source]
            guesses["by_source"][at] = _best(same if len(same) else known, judged.limit)
        line = _regression(np.array([_size(length) for length in rest]), known)
        guesses["by_length"][mine] = line(np.array([_size(lengths[at]) for at in mine]))[:, None]
    return {name: _guess_scores(guess, tokens, judged.limit) for name, guess in guesses.items()}


def _best(tokens: Ints, limit: int) -> Doubles:
    """[median, then for each granularity the middle of the most frequent bucket]."""
    frequent = [int(np.bincount(np.minimum(tokens // g, (limit - 1) // g)).argmax()) for g in GRANULARITIES]
    middles = [(bucket + 0.5) * g for bucket, g in zip(frequent, GRANULARITIES, strict=True)]
    return np.array([float(np.median(tokens)), *middles])


def _guess_scores(guess: Doubles, tokens: Ints, limit: int) -> dict[str, Any]:
    right = {str(g): guessed(guess[:, at], tokens, limit)[str(g)] for at, g in enumerate(GRANULARITIES, start=1)}
    return guessed(guess[:, 0], tokens, limit) | right


def _size(length: Length) -> float:
    """Logarithm of the prompt's characters: unlike its tokens, they are known for every file."""
    return float(np.log1p(len(length.prompt)))


def _regression(sizes: Doubles, tokens: Ints) -> Callable[[Doubles], Doubles]:
    """Fit a parabola over the prompt's size with the least absolute error, by iteratively reweighted least squares."""
    middle = sizes.mean()

    def powers(x: Doubles) -> Doubles:
        return np.stack([np.ones_like(x), x - middle, (x - middle) ** 2], axis=1)

    weights = np.ones(len(sizes))
    for _ in range(30):
        of = powers(sizes) * weights[:, None]
        factors = np.linalg.lstsq(of, tokens * weights, rcond=None)[0]
        weights = 1.0 / np.sqrt(np.maximum(np.abs(powers(sizes) @ factors - tokens), 1.0))
    return lambda x: np.asarray(np.maximum(powers(x) @ factors, 0.0))


def _bound(judged: Judged, kind: str, predictor: Loaded) -> dict[str, Any]:
    """The conformal upper bound: the share of texts that end below it, and its mean in tokens."""
    levels = predictor.card.levels
    share = float(np.interp(BOUND, np.arange(1, len(levels) + 1) / (len(levels) + 1), levels)) if levels else BOUND
    high = quantiles(judged.distribution[kind], judged.width, min(share, 1.0), judged.limit + 1)
    inside = float((judged.tokens < high).mean())
    return {"share": BOUND, "inside": round(inside, 4), "tokens": round(float(high.mean()))}


def _later(judged: Judged, known: int) -> dict[str, Any]:
    """Scores of the texts that are longer than `known` tokens, beside the guess by their median."""
    rows, distribution = judged.later[known]
    rest = judged.tokens[rows] - known
    limit = judged.limit - known
    found = scores(capped(distribution, judged.width, limit), rest, judged.width, limit)
    return found | {"mae_of_the_median": round(float(np.abs(np.median(rest) - rest).mean()), 1)}


def capped(distribution: Doubles, width: int, limit: int) -> Doubles:
    """Merge all buckets at or above the limit into the bucket of the limit."""
    last = min(limit // width, distribution.shape[1] - 1)
    return np.concatenate([distribution[:, :last], distribution[:, last:].sum(axis=1, keepdims=True)], axis=1)


def predictions(judged: Judged) -> list[dict[str, Any]]:
    """One row of JSON data per text, for the simulator: its lengths and its predictions, also the later ones."""
    rows: list[dict[str, Any]] = []
    for number, length in enumerate(judged.lengths):
        row: dict[str, Any] = {"prompt_tokens": length.prompt_tokens, "tokens": length.tokens, "source": length.source}
        row |= {kind: _rounded(of[number]) for kind, of in judged.distribution.items() if kind != "both"}
        rows.append(row | {"width": judged.width})
    for known, (places, distribution) in judged.later.items():
        for number, one in zip(places, distribution, strict=True):
            rows[number].setdefault("later", {})[str(known)] = _rounded(one)
    return rows


def _rounded(distribution: Doubles) -> list[float]:
    return [round(float(share), 5) for share in distribution]
