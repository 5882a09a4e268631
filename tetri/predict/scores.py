"""Scores of length distributions: accuracy, absolute error, calibration and order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
GRANULARITIES = (100, 200, 400)  # tokens per bucket at which accuracy is reported
BINS = 10  # of confidence


def merged(distribution: Doubles, width: int, granularity: int) -> Doubles:
    """Merge buckets of `width` tokens into buckets of `granularity` tokens, a multiple of `width`."""
    starts = np.arange(0, distribution.shape[1], granularity // width)
    return np.asarray(np.add.reduceat(distribution, starts, axis=1))


def labels(tokens: Ints, granularity: int, buckets: int) -> Ints:
    """The bucket of each length; the last bucket has no upper end."""
    return np.minimum(tokens // granularity, buckets - 1)


def accuracy(distribution: Doubles, tokens: Ints, width: int, granularity: int) -> float:
    """Share of the texts whose likeliest bucket of `granularity` tokens is the true one."""
    wide = merged(distribution, width, granularity)
    return float(np.mean(wide.argmax(axis=1) == labels(tokens, granularity, wide.shape[1])))


def quantiles(distribution: Doubles, width: int, share: float, limit: int) -> Doubles:
    """The quantile `share` of each distribution, in tokens; `limit` if it lies in the open last bucket."""
    below = np.cumsum(distribution, axis=1)
    bucket = np.minimum((below < share).sum(axis=1), distribution.shape[1] - 1)
    row = np.arange(len(distribution))
    before = np.where(bucket > 0, below[row, bucket - 1], 0.0)
    inside = np.clip((share - before) / np.maximum(distribution[row, bucket], 1e-12), 0.0, 1.0)
    last = bucket == distribution.shape[1] - 1
    return np.asarray(np.where(last, limit, np.minimum((bucket + inside) * width, limit)))


def means(distribution: Doubles, width: int, limit: int) -> Doubles:
    """The mean of each distribution, in tokens; the open last bucket counts as `limit`."""
    middle = (np.arange(distribution.shape[1]) + 0.5) * width
    middle[-1] = max(limit, middle[-1])
    return np.asarray(distribution @ middle)


def calibration_error(distribution: Doubles, tokens: Ints, width: int, granularity: int) -> float:
    """Expected calibration error: gap between the share of the likeliest bucket and how often it is right."""
    wide = merged(distribution, width, granularity)
    sure = wide.max(axis=1)
    right = wide.argmax(axis=1) == labels(tokens, granularity, wide.shape[1])
    bins = np.minimum((sure * BINS).astype(int), BINS - 1)
    gaps = [abs(float((right[bins == one] - sure[bins == one]).sum())) for one in range(BINS)]
    return sum(gaps) / len(tokens)


def tau(guess: Doubles, tokens: Ints) -> float:
    """Kendall's tau-b of two orders; 0 if all values of one of them are equal."""
    same, tied_guess, tied_tokens, count = 0, 0, 0, len(tokens)
    for at in range(count - 1):  # row by row, so that memory stays linear
        up = np.sign(guess[at + 1 :] - guess[at])
        real = np.sign(tokens[at + 1 :] - tokens[at])
        same += int((up * real).sum())
        tied_guess += int((up == 0).sum())
        tied_tokens += int((real == 0).sum())
    pairs = count * (count - 1) // 2
    of = float((pairs - tied_guess) * (pairs - tied_tokens)) ** 0.5
    return same / of if of else 0.0


def ranked(distribution: Doubles, tokens: Ints, width: int) -> float:
    """Ranked probability score, in tokens: squared distance between the predicted and the true cumulative distribution.
    Less is better."""
    below = np.cumsum(distribution, axis=1)[:, :-1]
    ends = (np.arange(distribution.shape[1] - 1) + 1) * width
    return float(np.mean((((tokens[:, None] < ends) - below) ** 2).sum(axis=1)) * width)


def scores(distribution: Doubles, tokens: Ints, width: int, limit: int) -> dict[str, Any]:
    """All scores as JSON data; `n` is the number of texts, `mae` and `rps` are in tokens."""
    return {
        "n": len(tokens),
        "acc": {str(g): _short(accuracy(distribution, tokens, width, g)) for g in GRANULARITIES},
        "mae": round(float(np.abs(quantiles(distribution, width, 0.5, limit) - tokens).mean()), 1),
        "ece": _short(calibration_error(distribution, tokens, width, 200)),
        "tau": _short(tau(means(distribution, width, limit), tokens)),
        "rps": round(ranked(distribution, tokens, width), 1),
    }


def guessed(guess: Doubles, tokens: Ints, limit: int) -> dict[str, Any]:
    """The scores that apply to guesses of one number of tokens per text."""
    found: dict[str, Any] = {}
    for g in GRANULARITIES:
        last = (limit - 1) // g
        right = np.minimum(np.maximum(guess, 0) // g, last) == np.minimum(tokens // g, last)
        found[str(g)] = _short(float(right.mean()))
    return found | {"mae": round(float(np.abs(guess - tokens).mean()), 1), "tau": _short(tau(guess, tokens))}


def ceiling(samples: Mapping[str, list[int]], limit: int) -> dict[str, Any]:
    """How well the length of a text can be predicted from other texts of the same prompt. A predictor that knows only
    the prompt is not much better. `samples`: lengths by prompt; prompts with one length are ignored.

    another  from one other text
    others   from all other texts: the likeliest bucket, the median
    at_most  from all texts, itself included: an upper bound for any predictor
    """
    many = {key: np.array(tokens) for key, tokens in samples.items() if len(tokens) > 1}
    if not many:
        return {}
    found: dict[str, Any] = {"prompts": len(many), "texts": sum(map(len, many.values()))}
    for name in ("another", "others", "at_most"):
        found[name] = {str(g): _short(_agreement(name, many, g, (limit - 1) // g)) for g in GRANULARITIES}
    rows = [(key, i, j) for key, of in many.items() for i in range(len(of)) for j in range(len(of)) if i != j]
    one, other = (np.array([many[row[0]][row[at]] for row in rows]) for at in (1, 2))
    firsts, seconds = (np.array([of[at] for of in many.values()]) for at in (0, 1))
    order = _short(tau(firsts.astype(np.float64), seconds))
    found["another"] |= {"mae": round(float(np.abs(one - other).mean()), 1), "tau": order}
    rest = [(np.median(np.delete(of, at)), of[at]) for of in many.values() for at in range(len(of))]
    guess, real = (np.array(column) for column in zip(*rest, strict=True))
    found["others"] |= {"mae": round(float(np.abs(guess - real).mean()), 1)}
    return found


def _agreement(name: str, many: Mapping[str, Ints], granularity: int, last: int) -> float:
    shares = []
    for tokens in many.values():
        counts = np.bincount(np.minimum(tokens // granularity, last), minlength=last + 1)
        each, size = counts[counts > 0], len(tokens)
        if name == "another":
            shares.append(float((each * (each - 1)).sum() / (size * (size - 1))))
        elif name == "at_most":
            shares.append(float(each.max() / size))
        else:
            shares.append(_by_others(counts, size))
    return float(np.mean(shares))


def _by_others(counts: Ints, size: int) -> float:
    """Accuracy when each text is guessed as the most frequent bucket of the others; ties are broken at random."""
    right = 0.0
    for bucket in np.flatnonzero(counts):
        rest = counts - (np.arange(len(counts)) == bucket)
        if rest[bucket] == rest.max():
            right += counts[bucket] / (rest == rest.max()).sum()
    return float(right / size)


def _short(number: float) -> float:
    return round(number, 4)
