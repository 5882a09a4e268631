"""The lengths of all requests that end here, whatever their prompt: what is said of one that nobody predicted."""

from __future__ import annotations

from itertools import accumulate

from tetri.policy.distribution import Curve, bounded, raised, survivors
from tetri.request import LengthDistribution, blocks_for

#: Requests that what was known before any traffic counts for.
START = 64
#: Ends after which an end has lost all but 1 / e of its weight. The share of a bucket is then as exact as that of
#: 2 x MEMORY texts: within 2 % of all.
MEMORY = 256
#: Buckets; lengths beyond the last one are all alike.
MOST = 256
_HEAVY = 1e12


class Prior:
    """A table of hazards: of those that reach a bucket, the share that ends in it. So a request that was cut off by
    its own `max_tokens` counts as far as it came, and tells nothing of where it would have ended."""

    def __init__(self, known: LengthDistribution, context: int) -> None:
        self.width = known.width
        size = min(max(blocks_for(context, known.width), len(known.shares)), MOST)
        self._ended, self._cut, self._part = [0.0] * size, [0.0] * size, [0.0] * size
        for place, share in enumerate(known.shares[:-1]):
            self._ended[min(place, size - 1)] += START * share
        if known.shares:
            self._cut[min(len(known.shares), size) - 1] += START * known.shares[-1]
        self._weight = 1.0  # of the next end: it grows, instead of all the others shrinking
        self._new = 0.0
        self._below: list[float] = []
        self._tail = 0.0
        self._count()

    def learn(self, outputs: int, cut: bool) -> None:
        """A request had so many output tokens in the end; `cut`: it would have gone on."""
        place, last = outputs // self.width, len(self._ended) - 1
        weight = self._weight
        if place >= last:
            self._cut[last] += weight
        elif cut:
            self._cut[place] += weight
            self._part[place] += weight * (outputs % self.width) / self.width
        else:
            self._ended[place] += weight
        self._new += weight
        self._weight *= 1 + 1 / MEMORY
        if self._weight > _HEAVY:
            for table in (self._ended, self._cut, self._part):
                table[:] = [each / self._weight for each in table]
            self._new, self._weight = self._new / self._weight, 1.0

    def curve(self, written: int, least: int, most: int) -> Curve:
        """The lengths of those that have `written` tokens and go on, to `most` at most, which is more."""
        if self._new > self._weight * MEMORY / 64:
            self._count()
        need = most // self.width + 2
        below = self._below[:need]
        while len(below) < min(need, MOST + 1):
            below.append(1 - (1 - below[-1]) * (1 - self._tail))
        tokens = range(0, len(below) * self.width, self.width)
        return raised(survivors(bounded(tokens, below, 1, most), written), least)

    def _count(self) -> None:
        """The shares below the end of each bucket that anybody reached."""
        self._new = 0.0
        both = [ended + cut for ended, cut in zip(self._ended, self._cut, strict=True)]
        reached = list(accumulate(reversed(both)))[::-1]
        risks = [
            risk - cut + part for risk, cut, part in zip(reached[:-1], self._cut[:-1], self._part[:-1], strict=True)
        ]
        at_risk = sum(risks)
        self._tail = sum(self._ended[:-1]) / at_risk if at_risk else 0.0
        left, self._below = 1.0, [0.0]
        for ended, risk in zip(self._ended, risks, strict=False):
            if risk <= 0:
                break
            left *= 1 - (ended + self._weight * self._tail) / (risk + self._weight)
            self._below.append(1 - left)
