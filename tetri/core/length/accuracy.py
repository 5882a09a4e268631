"""The accuracy record of one kind of length predictions: compares them with the prior and switches them on or off."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import sqrt

from tetri.core.length.calibration import Calibration

#: Ended requests that are compared at most, and how many are needed for a decision.
WINDOW, LEAST = 256, 50
#: Standard errors by which the mean difference must exceed zero: by chance about one time in 160.
SURE = 2.5
#: And by this share of the prior's score, otherwise two equally good predictors would alternate for ever.
MATTERS = 0.01
#: Buckets in `counts`; the last one includes all longer outputs.
LABELS = 16


class AccuracyRecord:
    """The record of a predictor against the prior, on the same requests.

    It is switched off when its ranked probability score is worse than the prior's, by more than `SURE` standard errors
    and more than `MATTERS`. It is switched on again when it is better by as much. Each decision counts only requests
    that ended since the last switch; a predictor that is off is still scored.

    on                                               whether its ranges are used, instead of the prior's
    predicted, scored, right, prior_right, inside    as in `PredictorStatus`
    counts                                           (likeliest bucket, actual bucket) -> requests"""

    def __init__(self, name: str, levels: Sequence[float]) -> None:
        self.name = name
        self.calibration = Calibration(levels)
        self.on = True
        self.predicted = self.scored = self.right = self.prior_right = self.inside = 0
        self.counts: dict[tuple[int, int], int] = {}
        self._scores: deque[tuple[float, float]] = deque()  # gain over the prior, the prior's score
        self._sums = (0.0, 0.0, 0.0)  # of gains, squared gains and prior scores in `_scores`
        self._loss = self._error = 0.0  # mean difference and its error when it was switched off

    def came(self, label: int, prior_label: int, bucket: int, inside: bool) -> None:
        """Count a request that ended in `bucket`. `label`, `prior_label`: the predicted buckets; `inside`: whether the
        length was below the high end of its range."""
        self.scored += 1
        self.right += label == bucket
        self.prior_right += prior_label == bucket
        self.inside += inside
        place = min(label, LABELS - 1), min(bucket, LABELS - 1)
        self.counts[place] = self.counts.get(place, 0) + 1

    def judge(self, own: float, prior: float) -> None:
        """Add the predictor's and the prior's score of a request, in tokens (lower is better). Switch on or off."""
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
        """Return why the predictor was switched off, for the status output."""
        return f"{self.name} did worse than the prior by {self._loss:.3g} +- {self._error:.2g} tokens of ranked score"
