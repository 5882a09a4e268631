"""Whether one kind of a predictor's answers is worth using: its record against the prior's."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import sqrt

from tetri.core.calibration import Calibration

#: Ends that are compared, and how many of them are needed to say anything.
WINDOW, LEAST = 256, 50
#: Standard errors by which the mean difference must be off zero: about one time in 160 by chance.
SURE = 2.5
#: Labels that are told apart in the counts; the last one is for all from there on.
LABELS = 16


class Track:
    """`on`: the predictor's ranges are used, else the prior's; it is judged all the same. It is switched off when its
    ranked probability score has been worse than the prior's on the same requests, by more than the differences
    scatter, and on when it has been better by as much, each time on ends since the last switch.

    predicted, scored, right, prior_right, inside    as in `PredictorStatus`
    counts                                           (likeliest bucket, bucket that came) -> how often"""

    def __init__(self, name: str, levels: Sequence[float]) -> None:
        self.name = name
        self.calibration = Calibration(levels)
        self.on = True
        self.predicted = self.scored = self.right = self.prior_right = self.inside = 0
        self.counts: dict[tuple[int, int], int] = {}
        self._gains: deque[float] = deque()
        self._sum = self._squares = 0.0  # of the gains
        self.mean = self.error = 0.0  # of the gains, when they were judged last

    def came(self, label: int, prior_label: int, bucket: int, inside: bool) -> None:
        """A request that was said to end in the bucket `label` has ended in `bucket`."""
        self.scored += 1
        self.right += label == bucket
        self.prior_right += prior_label == bucket
        self.inside += inside
        place = min(label, LABELS - 1), min(bucket, LABELS - 1)
        self.counts[place] = self.counts.get(place, 0) + 1

    def judge(self, gain: float) -> None:
        """Its score was less than the prior's, and so better, by `gain` tokens."""
        gains = self._gains
        gains.append(gain)
        old = gains.popleft() if len(gains) > WINDOW else 0.0
        self._sum += gain - old
        self._squares += gain * gain - old * old
        count = len(gains)
        if count < LEAST:
            return
        self.mean = self._sum / count
        self.error = sqrt(max(self._squares / count - self.mean**2, 0.0) / (count - 1))
        worse = self.mean < -SURE * self.error if self.on else self.mean <= SURE * self.error
        if worse == self.on:
            self.on = not self.on
            gains.clear()
            self._sum = self._squares = 0.0

    def why_off(self) -> str:
        return f"{self.name} did worse than the prior by {-self.mean:.3g} +- {self.error:.2g} tokens of ranked score"
