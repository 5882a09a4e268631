"""How far a predictor's odds may be trusted, learned from the lengths that came."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Sequence
from math import ceil

from tetri.policy.distribution import Curve

#: Ends that count; the older ones are forgotten.
WINDOW = 256
#: As many of them are taken out of `Expected.levels` at the start.
START = 64
_GOLDEN = 0.6180339887498949  # its multiples, without their whole parts, are spread as evenly as can be


class Calibration:
    """The window holds the place of each length in its own odds: the share of the odds that was below it (the
    probability integral transform). Of odds that are right, these places are spread evenly over 0 to 1; a predictor
    that always says too little has them all near 1. What share of the window is at or below a place says what the odds
    there are worth (quantile recalibration), and the right rank in the window bounds the next length from above with
    the probability asked for, however wrong the odds are, as long as the traffic stays the same (split conformal
    prediction)."""

    def __init__(self, levels: Sequence[float]) -> None:
        self._places: deque[float] = deque()
        self._sorted: list[float] = []
        self._turn = 0
        quantiles = [0.0, *levels, 1.0]
        for number in range(1, START + 1):  # in an order of which every stretch is spread evenly, as they go by age
            at = (number * _GOLDEN % 1.0) * (len(quantiles) - 1)
            whole = int(at)
            self._enter(quantiles[whole] + (at - whole) * (quantiles[whole + 1] - quantiles[whole]))

    def _enter(self, place: float) -> None:
        self._places.append(place)
        insort(self._sorted, place)
        if len(self._places) > WINDOW:
            del self._sorted[bisect_left(self._sorted, self._places.popleft())]

    def came(self, place: float) -> None:
        """A length came at this place in its odds."""
        self._enter(place)

    def passed(self, place: float) -> None:
        """A length was cut off at this place in its odds: it would have been beyond, and counts as if it had ended
        where others of those beyond do, each time somewhere else among them."""
        self._turn += 1
        trusted = self.trusted(place)
        wanted = trusted + (1.0 - trusted) * (self._turn * _GOLDEN % 1.0)
        self._enter(max(place, self.level(wanted)))

    def trusted(self, place: float) -> float:
        """The share of lengths that is really at or below this place in their odds."""
        if place <= 0.0 or place >= 1.0:
            return min(max(place, 0.0), 1.0)
        known = self._sorted
        rank = bisect_right(known, place)
        since = known[rank - 1] if rank else 0.0
        to = known[rank] if rank < len(known) else 1.0
        more = (place - since) / (to - since) if to > since else 0.0
        return (rank + more) / (len(known) + 1)

    def level(self, share: float) -> float:
        """The place in the odds that at least this share of the lengths is at or below."""
        rank = ceil((len(self._sorted) + 1) * share)
        return self._sorted[max(rank, 1) - 1] if rank <= len(self._sorted) else 1.0

    def corrected(self, curve: Curve) -> Curve:
        """The same with odds that are right, as far as the window knows."""
        return Curve(curve.tokens, (0.0, *map(self.trusted, curve.below[1:-1]), 1.0))
