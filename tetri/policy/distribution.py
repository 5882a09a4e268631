"""What odds say of the length of one request: pure functions.

Odds come from a predictor, in buckets of one width, the last one open. A request has more to it: it has written some
tokens already and goes on, may write `max_tokens` and no more, or not fewer than `min_tokens`. `curve_of` puts that
together in a `Curve`, from which ranges, quantiles and scores are read."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from math import ceil

from tetri.request import LengthDistribution, LengthRange, Value

#: A share so small that nothing can be said of those in it: what floats leave of 1 after a sum of some hundred.
NOTHING = 1e-9


class Curve(Value, frozen=True):
    """How likely each number of output tokens is, all attempts together, for one request: `below[i]` of the lengths
    are less than `tokens[i]`, and between two of these they are spread evenly. `tokens` ascend from the least that is
    possible to one more than the most, `below` from 0 to 1. Those that are cut off at `max_tokens` have it as their
    length: the last step of the curve, one token wide."""

    tokens: tuple[int, ...]
    below: tuple[float, ...]


def usable(distribution: LengthDistribution) -> bool:
    """Whether these are odds at all; a head with a NaN in it yields none."""
    return (
        distribution.width > 0
        and min(distribution.shares, default=-1.0) >= 0
        and abs(sum(distribution.shares) - 1) < 1e-3
    )


def curve_of(
    distribution: LengthDistribution, most: int, *, after: int = 0, least: int = 0, tail: Curve | None = None
) -> Curve:
    """The lengths of a request that has `after` tokens, of which the odds say how many follow, one at least. It has no
    fewer than `least` in the end: whoever would be shorter ends soon after these; and no more than `most`, which is
    more than `after`. What the open bucket holds is spread as `tail` says, for lengths that reach so far, or else is
    all cut off at `most`."""
    sums = [0.0, *accumulate(distribution.shares)]
    closed = after + (len(distribution.shares) - 1) * distribution.width  # from here on the bucket is open
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
    """A curve from `least` to `most`: what is less goes into its first step, what is more is cut off at `most`. At
    least two points, ascending, the first of share 0 and not above `most`."""
    least = min(least, most)
    first, last = bisect_right(tokens, least), bisect_left(tokens, most)
    if least == most:
        return Curve((most, most + 1), (0.0, 1.0))
    at_most = _between(tokens, below, most)
    return Curve((least, *tokens[first:last], most, most + 1), (0.0, *below[first:last], at_most, 1.0))


def raised(curve: Curve, least: int) -> Curve:
    """The same where the length is at least `least`: whoever would be shorter ends soon after."""
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
    """The tokens below which this share of the lengths is: the fewest, where several are."""
    place = bisect_left(curve.below, share)
    if place == 0:
        return curve.tokens[0]
    if place == len(curve.below):
        return curve.tokens[-1]
    since, before = curve.tokens[place - 1], curve.below[place - 1]
    return since + (curve.tokens[place] - since) * (share - before) / (curve.below[place] - before)


def survivors(curve: Curve, written: int) -> Curve:
    """The lengths of those that have `written` tokens and go on. Where the curve knows of nobody who writes more, all
    go on to its end, and past that end it is one token more."""
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
    """The share of each bucket of `granularity` tokens that the curve reaches, and the label of the first one."""
    first = curve.tokens[0] // granularity
    ends = range((first + 1) * granularity, curve.tokens[-1], granularity)
    sums = [0.0, *(share_below(curve, end) for end in ends), 1.0]
    return first, [after - before for before, after in zip(sums, sums[1:], strict=False)]


def likeliest(curve: Curve, granularity: int) -> int:
    """The label of the likeliest bucket of `granularity` tokens, the first of equals."""
    first, shares = by_bucket(curve, granularity)
    return first + shares.index(max(shares))


def range_of(curve: Curve, granularity: int, high: float | None = None) -> LengthRange:
    """The likeliest bucket of `granularity` tokens, without what the curve says is impossible. With `high`, tokens
    below which the length is to be, the range ends there; it begins with the likeliest bucket or, if that is beyond,
    with the last one below the end."""
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
    """The ranked probability score, in tokens: how far the shares below each of `tokens` were from what came, squared
    and summed. Less is better, and least on average is what the true odds score."""
    score, since = 0.0, tokens[0]
    for at, share in zip(tokens, below, strict=True):
        score += (share - (length < at)) ** 2 * (at - since)
        since = at
    return score
