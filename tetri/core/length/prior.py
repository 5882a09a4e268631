"""The prior: the distribution of output lengths over all requests that end here, whatever their prompt."""

from __future__ import annotations

from itertools import accumulate

from tetri.policy.distribution import Curve, bounded, raised, survivors
from tetri.request import LengthDistribution, blocks_for

#: Weight of the initial distribution, in requests.
START = 64
#: Ended requests after which the weight of an older one falls to 1 / e. The shares are then as exact as those of
#: 2 x MEMORY requests: within 2 % of the total.
MEMORY = 256
#: Buckets at most; the last one includes all longer outputs.
MOST = 256
_HEAVY = 1e12


class Prior:
    """A table of hazards: of the requests that reach a bucket, the share that ends in it. A request that was cut off by
    its own `max_tokens` counts for the buckets that it reached, and for no end."""

    def __init__(self, known: LengthDistribution, context: int) -> None:
        self.width = known.width
        size = min(max(blocks_for(context, known.width), len(known.shares)), MOST)
        self._ended, self._cut, self._part = [0.0] * size, [0.0] * size, [0.0] * size
        for place, share in enumerate(known.shares[:-1]):
            self._ended[min(place, size - 1)] += START * share
        if known.shares:
            self._cut[min(len(known.shares), size) - 1] += START * known.shares[-1]
        self._weight = 1.0  # of the next ended request: it grows, which is cheaper than shrinking all the others
        self._new = 0.0
        self._below: list[float] = []
        self._tail = 0.0
        self._refresh()

    def learn(self, outputs: int, cut: bool) -> None:
        """Add a request that ended with `outputs` tokens. `cut`: it was cut off, its true length is greater."""
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
        """Return the length distribution of requests that have `written` tokens and continue, from `least` to `most`
        tokens. `most` must exceed `written`."""
        if self._new > self._weight * MEMORY / 64:
            self._refresh()
        need = most // self.width + 2
        below = self._below[:need]
        while len(below) < min(need, MOST + 1):
            below.append(1 - (1 - below[-1]) * (1 - self._tail))
        tokens = range(0, len(below) * self.width, self.width)
        return raised(survivors(bounded(tokens, below, 1, most), written), least)

    def _refresh(self) -> None:
        """Compute the shares of lengths below the end of each bucket that any request has reached."""
        self._new = 0.0
        both = [ended + cut for ended, cut in zip(self._ended, self._cut, strict=True)]
        reached = list(accumulate(reversed(both)))[::-1]
        buckets = zip(reached[:-1], self._cut[:-1], self._part[:-1], strict=True)
        risks = [risk - cut + part for risk, cut, part in buckets]
        at_risk = sum(risks)
        self._tail = sum(self._ended[:-1]) / at_risk if at_risk else 0.0
        left, self._below = 1.0, [0.0]
        for ended, risk in zip(self._ended, risks, strict=False):
            if risk <= 0:
                break
            left *= 1 - (ended + self._weight * self._tail) / (risk + self._weight)
            self._below.append(1 - left)
