"""Length policies: predictions of a request's output tokens, and functions on length ranges that other policies use.

The paper's predictor classifies the length into buckets of `length_granularity` tokens (section 3.3.2): label =
floor(length / granularity), range [label x granularity, (label + 1) x granularity). distribution.py has the functions
for the length distributions of a trained predictor.
"""

from __future__ import annotations

from random import Random
from typing import Protocol

from tetri.request import LengthRange, Sampling

#: Share of wrong labels that are one bucket off; of the rest, the same share is two buckets off, and so on. One half
#: reproduces the paper's three accuracies for the outputs of its figure 1: 58.9 % at 100 tokens becomes 74 % when
#: buckets are merged to 200 tokens (paper: 74.9 %), and 74.9 % at 200 becomes 85 % at 400 (paper: 85 %).
NEAR = 0.5

ENDS = ("low", "middle", "high")


class LengthSettings(Protocol):
    """The part of `Rules` that length policies use."""

    @property
    def length_granularity(self) -> int:
        """Tokens of one bucket."""

    @property
    def length_accuracy(self) -> float:
        """Probability, 0 to 1, that `noisy` names the right bucket."""


def none(prompt_tokens: int, sampling: Sampling, settings: LengthSettings, rng: Random) -> LengthRange | None:
    """No prediction. Other policies then use `max_tokens`: see `end_of`."""
    return None


def oracle(prompt_tokens: int, sampling: Sampling, settings: LengthSettings, rng: Random) -> LengthRange | None:
    """The true length, as a range of one token, if the request fixes it: with `ignore_eos` it writes `max_tokens`. None
    for any other request."""
    return fixed(sampling)


def noisy(prompt_tokens: int, sampling: Sampling, settings: LengthSettings, rng: Random) -> LengthRange | None:
    """An emulated predictor: the right bucket with probability `length_accuracy`, otherwise a wrong one. It is one off
    with probability `NEAR`, two off with (1 - NEAR) x NEAR, and so on, as often below as above, and above if there is
    no bucket below. The paper reports accuracies but no confusion matrix; this one agrees with all three. None if the
    request does not fix its length, as in `oracle`. An accuracy of 1 is an ideal prediction of this granularity."""
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
    """The prediction of a trained predictor, which reads the prompt or hidden states and therefore runs elsewhere: its
    distributions arrive with `LengthKnown` or engine steps, and core/length/estimator.py turns them into ranges. This
    function returns what is known without it, as `oracle`."""
    return fixed(sampling)


def bucket(label: int, granularity: int) -> LengthRange:
    """The range of tokens that a label stands for."""
    return LengthRange(low=label * granularity, high=(label + 1) * granularity)


def moved_up(length: LengthRange, outputs: int) -> LengthRange:
    """The range for a request that has `outputs` tokens and goes on: unchanged while `outputs` is below its end, then
    the range of the same width that contains `outputs`, since a predictor names buckets only. The paper leaves open
    what happens to a request that exceeds its prediction."""
    if outputs < length.high:
        return length
    width = length.high - length.low
    low = length.high + (outputs - length.high) // width * width
    return LengthRange(low=low, high=low + width)


def end_of(length: LengthRange | None, end: str, most: int) -> int:
    """The number of output tokens, from 1 to `most`, that a request is assumed to end with: the low end of its range,
    the middle, or the high end (the last length inside the range). Without a prediction the range is 1 to `most`. The
    paper uses the low end for admission and leaves open which one the dispatcher uses. Raises KeyError if `end` is not
    in `ENDS`."""
    low, last = (1, most) if length is None else (length.low, length.high - 1)
    tokens = {"low": low, "middle": (low + last) // 2, "high": last}[end]
    return max(1, min(tokens, most))


def heavy(length: LengthRange | None, heavy_tokens: int, most: int) -> bool:
    """Whether a decode counts as heavy: the middle of its range is more than `heavy_tokens`. With the high end and the
    paper's buckets of 200 tokens, every decode would be heavy; with the middle, those predicted to write 200 tokens or
    more are. Without a prediction no decode is heavy."""
    return length is not None and end_of(length, "middle", most) > heavy_tokens


def fixed(sampling: Sampling, outputs: int = 0) -> LengthRange | None:
    """The length of a request with `ignore_eos`: `max_tokens`, or `outputs` + 1 if that is more, since it goes on. None
    for any other request."""
    length = max(sampling.max_tokens, outputs + 1)
    return LengthRange(low=length, high=length + 1) if sampling.ignore_eos else None
