"""How many output tokens a request will have: predictors as policies, and what a predicted range means for the others.

The paper's predictor classifies the length into buckets of `length_granularity` tokens (section 3.3.2): label =
floor(length / granularity), range [label x granularity, (label + 1) x granularity). What follows from the odds of a
trained one is in odds.py.
"""

from __future__ import annotations

from random import Random
from typing import Protocol

from tetri.request import LengthRange, Sampling

#: Share of wrong labels that are one bucket off; each bucket further is as much rarer again. With a half, and the
#: answers of the paper's figure 1, its three accuracies follow from one another: 58.9 % right at 100 tokens is 74 %
#: when buckets are merged to 200 (paper: 74.9 %), and 74.9 % at 200 is 85 % at 400 (paper: 85 %).
NEAR = 0.5

ENDS = ("low", "middle", "high")


class LengthSettings(Protocol):
    """The part of `Rules` that predictors use."""

    @property
    def length_granularity(self) -> int: ...

    @property
    def length_accuracy(self) -> float: ...


def none(prompt_tokens: int, sampling: Sampling, settings: LengthSettings, rng: Random) -> LengthRange | None:
    """Nobody predicts. Only `max_tokens` is known then: see `end_of`."""
    return None


def oracle(prompt_tokens: int, sampling: Sampling, settings: LengthSettings, rng: Random) -> LengthRange | None:
    """The true length, as a range of one token, where the request fixes it: it ignores the end of sequence and so
    writes `max_tokens`. None for any other."""
    return fixed(sampling)


def noisy(prompt_tokens: int, sampling: Sampling, settings: LengthSettings, rng: Random) -> LengthRange | None:
    """The right bucket with probability `length_accuracy`, else a wrong one: one off with probability `NEAR`, two off
    with (1 - NEAR) x NEAR, and so on, as often below as above, and above where there is none below. The paper gives
    accuracies and no matrix of confusion; this one agrees with all three of them. None where `oracle` knows nothing.
    An accuracy of 1 is an ideal prediction of this granularity."""
    if not sampling.ignore_eos:
        return None
    label = sampling.max_tokens // settings.length_granularity
    if rng.random() >= settings.length_accuracy:
        far = 1
        while rng.random() >= NEAR:
            far += 1
        below = rng.random() < 0.5 and far <= label
        label += -far if below else far
    return bucket(label, settings.length_granularity)


def trained(prompt_tokens: int, sampling: Sampling, settings: LengthSettings, rng: Random) -> LengthRange | None:
    """A trained predictor says it, which reads more than is known here: its odds come with `LengthKnown` or with the
    engine's steps, and core/length/estimator.py makes ranges of them. Here: what is known without it, as `oracle`."""
    return fixed(sampling)


def bucket(label: int, granularity: int) -> LengthRange:
    """The range of tokens that a label stands for."""
    return LengthRange(low=label * granularity, high=(label + 1) * granularity)


def moved_up(length: LengthRange, outputs: int) -> LengthRange:
    """The range for a request that has `outputs` tokens and goes on. Unchanged below the range's end; from there on
    the range of the same width that holds `outputs`, since its buckets are all that a predictor's label can name. The
    paper does not say what happens to a job that outlives its prediction."""
    if outputs < length.high:
        return length
    width = length.high - length.low
    low = length.high + (outputs - length.high) // width * width
    return LengthRange(low=low, high=low + width)


def end_of(length: LengthRange | None, end: str, most: int) -> int:
    """Output tokens, from 1 to `most`, that a request is taken to end with: the low end of its range, the middle or
    the high end (its last token that is still inside). Without a prediction the range is all that is possible, 1 to
    `most`. The paper uses the low end for admission and does not say which one the dispatcher uses. Raises KeyError
    for another name of an end."""
    low, last = (1, most) if length is None else (length.low, length.high - 1)
    tokens = {"low": low, "middle": (low + last) // 2, "high": last}[end]
    return max(1, min(tokens, most))


def heavy(length: LengthRange | None, heavy_tokens: int, most: int) -> bool:
    """Whether a decode counts as heavy: the middle of its range is more than `heavy_tokens`. Not an end, since with the
    paper's 200 tokens a bucket the high end would make every decode heavy; the middle makes those so that are
    predicted to write 200 or more. Without a prediction nobody is heavy: they are all alike."""
    return length is not None and end_of(length, "middle", most) > heavy_tokens


def fixed(sampling: Sampling, outputs: int = 0) -> LengthRange | None:
    """The length of a request that ignores the end of sequence: `max_tokens`, and more than the `outputs` that it has.
    None for any other."""
    length = max(sampling.max_tokens, outputs + 1)
    return LengthRange(low=length, high=length + 1) if sampling.ignore_eos else None
