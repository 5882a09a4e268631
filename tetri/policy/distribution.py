"""Length distributions of single requests: pure functions.

A predictor yields a length distribution in buckets of equal width, the last of them open. The length of a request also
depends on the tokens that it has written, on `max_tokens` and on `min_tokens`. `curve_of` combines all of these into a
`Curve`, which yields length ranges, quantiles and scores."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from math import ceil

from tetri.request import LengthDistribution, LengthRange, Value

#: A share that counts as 0: the rounding error of a sum of a few hundred floats.
NOTHING = 1e-9


class Curve(Value, frozen=True):
    """The cumulative distribution of a request's output tokens over all attempts: the share `below[i]` of the lengths
    is less than `tokens[i]`, linear in between. `tokens` ascend from the least possible length to one more than the
    greatest, `below` ascend from 0 to 1. Outputs that are cut off at `max_tokens` have this length; they are the last
    step of the curve, one token wide."""

    tokens: tuple[int, ...]
    below: tuple[float, ...]


def usable(distribution: LengthDistribution) -> bool:
    """Whether a distribution is valid: shares not negative and with sum 1. A predictor with a NaN in it yields invalid
    ones."""
    shares = distribution.shares
    return distribution.width > 0 and min(shares, default=-1.0) >= 0 and abs(sum(shares) - 1) < 1e-3


def curve_of(
    distribution: LengthDistribution, most: int, *, after: int = 0, least: int = 0, tail: Curve | None = None
) -> Curve:
    """The lengths of a request that has `after` tokens; `distribution` gives the number of tokens that follow, at least
    one. The total length is at least `least` (shorter lengths move to just after it) and at most `most`, which must
    exceed `after`. The share of the open bucket is distributed as in `tail`, a curve of total lengths; without a tail
    it is cut off at `most`."""
    sums = [0.0, *accumulate(distribution.shares)]
    closed = after + (len(distribution.shares) - 1) * distribution.width  # start of the open bucket
    tokens = list(range(after, min(closed, most) + 1, distribution.width))
    below = [share / sums[-1] for share in sums[: len(tokens)]]
    if closed < most and tail is not None:
        left, beyond = 1.0 - below[-1], survivors(tail, closed - 1)
        tokens += beyond.tokens[1:]
        below += [below[-1] + left * share for share in beyond.below[1:]]
    elif closed < most:
        tokens.append(most)
        below.append(below[-1])
    elif tokens[-1] < most:  # the bucket that holds `most`
        tokens.append(tokens[-1] + distribution.width)
        below.append(sums[len(tokens) - 1] / sums[-1])
    return bounded(tokens, below, max(after + 1, least), most)


def bounded(tokens: Sequence[int], below: Sequence[float], least: int, most: int) -> Curve:
    """A curve from `least` to `most`: lesser lengths move into its first step, greater ones are cut off at `most`. The
    arguments have at least two points, ascending; the first has share 0 and is not above `most`."""
    least = min(least, most)
    first, last = bisect_right(tokens, least), bisect_left(tokens, most)
    if least == most:
        return Curve((most, most + 1), (0.0, 1.0))
    at_most = _between(tokens, below, most)
    return Curve((least, *tokens[first:last], most, most + 1), (0.0, *below[first:last], at_most, 1.0))


def raised(curve: Curve, least: int) -> Curve:
    """A curve with lengths of at least `least`: shorter lengths move to just after it."""
    return curve if least <= curve.tokens[0] else bounded(curve.tokens, curve.below, least, curve.tokens[-1] - 1)


def _between(tokens: Sequence[int], below: Sequence[float], at: float) -> float:
    place = bisect_right(tokens, at)
    if place == 0:
        return 0.0
    if place == len(tokens):
        return below[-1]
    share, since = below[place - 1], tokens[place - 1]
    return share + (below[place] - share) * (at - since) / (tokens[place] - since)


def share_below(curve: Curve, tokens: float) -> float:
    """The share of lengths less than `tokens`."""
    return _between(curve.tokens, curve.below, tokens)


def quantile(curve: Curve, share: float) -> float:
    """The number of tokens that this share of the lengths is below; the least such number."""
    place = bisect_left(curve.below, share)
    if place == 0:
        return curve.tokens[0]
    if place == len(curve.below):
        return curve.tokens[-1]
    since, before = curve.tokens[place - 1], curve.below[place - 1]
    return since + (curve.tokens[place] - since) * (share - before) / (curve.below[place] - before)


def survivors(curve: Curve, written: int) -> Curve:
    """The conditional distribution of lengths, given that a request has `written` tokens and goes on. If the curve has
    no greater lengths, the length is the curve's end; past that end it is one more token."""
    least, last = written + 1, curve.tokens[-1]
    if least <= curve.tokens[0]:
        return curve
    if least >= last - 1:
        return Curve((least, max(last, least + 1)), (0.0, 1.0))
    gone = share_below(curve, least)
    left, first = 1.0 - gone, bisect_right(curve.tokens, least)
    if left < NOTHING:
        return Curve((least, last - 1, last), (0.0, 0.0, 1.0))
    rest = [(share - gone) / left for share in curve.below[first:-1]]
    return Curve((least, *curve.tokens[first:]), (0.0, *rest, 1.0))


def by_bucket(curve: Curve, granularity: int) -> tuple[int, list[float]]:
    """The label of the first bucket of `granularity` tokens that the curve reaches, and the share of each bucket."""
    first = curve.tokens[0] // granularity
    ends = range((first + 1) * granularity, curve.tokens[-1], granularity)
    sums = [0.0, *(share_below(curve, end) for end in ends), 1.0]
    return first, [after - before for before, after in zip(sums, sums[1:], strict=False)]


def likeliest(curve: Curve, granularity: int) -> int:
    """The label of the likeliest bucket of `granularity` tokens, on a tie the first."""
    first, shares = by_bucket(curve, granularity)
    return first + shares.index(max(shares))


def range_of(curve: Curve, granularity: int, high: float | None = None) -> LengthRange:
    """The length range of the likeliest bucket of `granularity` tokens, without the impossible lengths. With `high`
    (tokens, a quantile), the range ends there; it begins with the likeliest bucket, or with the last bucket before the
    end if the likeliest is beyond it."""
    least, last = curve.tokens[0], curve.tokens[-1]
    label = likeliest(curve, granularity)
    if high is None:
        end = min((label + 1) * granularity, last)
    else:
        end = min(max(ceil(high - NOTHING), least + 1), last)
        label = min(label, (end - 1) // granularity)
    low = label * granularity
    return LengthRange(low=low if low >= least or least == 1 else least, high=end)


def ranked_score(tokens: Sequence[int], below: Sequence[float], length: int) -> float:
    """The ranked probability score in tokens: the squared difference between the cumulative distribution and the
    actual length's step function, integrated over tokens. Lower is better; the true distribution has the lowest
    expected score."""
    score, since = 0.0, tokens[0]
    for at, share in zip(tokens, below, strict=True):
        score += (share - (length < at)) ** 2 * (at - since)
        since = at
    return score
