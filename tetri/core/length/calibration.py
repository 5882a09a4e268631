"""Calibration of a predictor's length distributions, learned from actual lengths."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Sequence
from math import ceil

from tetri.policy.distribution import Curve

#: Ended requests that count; older ones are forgotten.
WINDOW = 256
#: Places in the initial window, from `Expected.levels`.
START = 64
_GOLDEN = 0.6180339887498949  # the fractional parts of its multiples are spread evenly


class Calibration:
    """A window of *places*. The place of a length is the share of its predicted distribution below it, 0 to 1 (the
    probability integral transform). Places of a correct predictor are spread evenly; those of a predictor that is
    always too low are near 1.

    The share of the window at or below a place is the calibrated probability there (quantile recalibration). A rank in
    the window bounds the next length from above with a given probability, however wrong the distributions are, as
    long as the traffic stays the same (split conformal prediction)."""

    def __init__(self, levels: Sequence[float]) -> None:
        self._places: deque[float] = deque()
        self._sorted: list[float] = []
        self._turn = 0
        quantiles = [0.0, *levels, 1.0]
        for number in range(1, START + 1):  # the oldest are dropped first, so each stretch must be spread evenly
            at = (number * _GOLDEN % 1.0) * (len(quantiles) - 1)
            whole = int(at)
            self._add(quantiles[whole] + (at - whole) * (quantiles[whole + 1] - quantiles[whole]))

    def _add(self, place: float) -> None:
        self._places.append(place)
        insort(self._sorted, place)
        if len(self._places) > WINDOW:
            del self._sorted[bisect_left(self._sorted, self._places.popleft())]

    def came(self, place: float) -> None:
        """Add the place of an actual length."""
        self._add(place)

    def passed(self, place: float) -> None:
        """Add the place of an output that was cut off (its true length is greater). It counts as one of the calibrated
        places beyond, a different one each time."""
        self._turn += 1
        trusted = self.trusted(place)
        wanted = trusted + (1.0 - trusted) * (self._turn * _GOLDEN % 1.0)
        self._add(max(place, self.level(wanted)))

    def trusted(self, place: float) -> float:
        """Return the calibrated share of lengths at or below this place."""
        if place <= 0.0 or place >= 1.0:
            return min(max(place, 0.0), 1.0)
        places = self._sorted
        rank = bisect_right(places, place)
        below = places[rank - 1] if rank else 0.0
        above = places[rank] if rank < len(places) else 1.0
        part = (place - below) / (above - below) if above > below else 0.0
        return (rank + part) / (len(places) + 1)

    def level(self, share: float) -> float:
        """Return the place that at least this share of lengths is at or below; 1.0 when the window is too small."""
        rank = ceil((len(self._sorted) + 1) * share)
        return self._sorted[max(rank, 1) - 1] if rank <= len(self._sorted) else 1.0

    def corrected(self, curve: Curve) -> Curve:
        """Return the calibrated curve."""
        return Curve(curve.tokens, (0.0, *map(self.trusted, curve.below[1:-1]), 1.0))
