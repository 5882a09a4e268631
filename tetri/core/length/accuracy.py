"""Whether one kind of a predictor's answers is worth using: its record against the prior's."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import sqrt

from tetri.core.length.calibration import Calibration

#: Ends that are compared, and how many of them are needed to say anything.
WINDOW, LEAST = 256, 50
#: Standard errors by which the mean difference must be off zero: about one time in 160 by chance.
SURE = 2.5
#: And by this share of the prior's own score, or two that are as good would take turns for ever.
MATTERS = 0.01
#: Labels that are told apart in the counts; the last one is for all from there on.
LABELS = 16


class AccuracyRecord:
    """`on`: the predictor's ranges are used, else the prior's; it is judged all the same. It is switched off when its
    ranked probability score has been worse than the prior's on the same requests, by more than the differences
    scatter and by enough to matter, and on when it has been better by as much, each time on ends since the last switch.

    predicted, scored, right, prior_right, inside    as in `PredictorStatus`
    counts                                           (likeliest bucket, bucket that came) -> how often"""

    def __init__(self, name: str, levels: Sequence[float]) -> None:
        self.name = name
        self.calibration = Calibration(levels)
        self.on = True
        self.predicted = self.scored = self.right = self.prior_right = self.inside = 0
        self.counts: dict[tuple[int, int], int] = {}
        self._scores: deque[tuple[float, float]] = deque()  # gain, and the prior's score
        self._sums = (0.0, 0.0, 0.0)  # of the gains, their squares, the prior's scores
        self._loss = self._error = 0.0  # by how much it was worse when it was switched off

    def came(self, label: int, prior_label: int, bucket: int, inside: bool) -> None:
        """A request that was said to end in the bucket `label` has ended in `bucket`."""
        self.scored += 1
        self.right += label == bucket
        self.prior_right += prior_label == bucket
        self.inside += inside
        place = min(label, LABELS - 1), min(bucket, LABELS - 1)
        self.counts[place] = self.counts.get(place, 0) + 1

    def judge(self, own: float, prior: float) -> None:
        """The predictor's and the prior's score of one request, in tokens, the less the better."""
        self._scores.append((prior - own, prior))
        self._add(prior - own, prior, 1)
        if len(self._scores) > WINDOW:
            self._add(*self._scores.popleft(), -1)
        count = len(self._scores)
        if count < LEAST:
            return
        total, squares, scores = self._sums
        mean = total / count
        error = sqrt(max(squares / count - mean**2, 0.0) / (count - 1))
        margin = max(SURE * error, MATTERS * scores / count)
        if mean < -margin if self.on else mean > margin:
            self.on, self._loss, self._error = not self.on, -mean, error
            self._scores.clear()
            self._sums = (0.0, 0.0, 0.0)

    def _add(self, gain: float, prior: float, sign: int) -> None:
        total, squares, scores = self._sums
        self._sums = (total + sign * gain, squares + sign * gain * gain, scores + sign * prior)

    def why_off(self) -> str:
        return f"{self.name} did worse than the prior by {self._loss:.3g} +- {self._error:.2g} tokens of ranked score"
