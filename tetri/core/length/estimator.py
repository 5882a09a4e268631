"""The length estimator of a worker: turns a predictor's distributions into length ranges, calibrated by actual
lengths, or uses the prior while that is better."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tetri.core.instance.identity import Identity
from tetri.core.length.accuracy import AccuracyRecord
from tetri.core.length.prior import Prior
from tetri.engine_request import HiddenStateEstimate
from tetri.policy.distribution import (
    Curve,
    curve_of,
    likeliest,
    quantile,
    range_of,
    ranked_score,
    share_below,
    survivors,
    usable,
)
from tetri.policy.length import fixed
from tetri.request import LengthDistribution, LengthRange, PredictorStatus, Sampling

#: Open requests whose predictions are remembered, and ended ones, at most; the oldest are forgotten. Twice the default
#: limit of open requests of a broker: if more requests waited than this, none would be remembered until its end.
MOST_OPEN = 8192
#: One of the first so many re-estimates of each request is scored. Requests take turns, whatever their length.
TURNS = 8


@dataclass(slots=True)
class Prediction:
    """A prediction to score when its request ends.

    raw                  the predictor's distribution, before calibration
    below, prior         shares below each of `raw.tokens` but the last: calibrated, and by the prior
    label, prior_label   likeliest buckets
    high                 high end of the range that was used
    """

    accuracy: AccuracyRecord
    raw: Curve
    below: tuple[float, ...]
    prior: tuple[float, ...]
    label: int
    prior_label: int
    high: int


@dataclass(slots=True)
class OpenRequest:
    """A predicted request that has not ended. `turns`: re-estimates before the one that is scored."""

    turns: int
    predictions: list[Prediction] = field(default_factory=list)


class LengthEstimator:
    """One per worker, shared by prefill and decode. `prior` learns from all requests that end here. Three kinds of
    predictions are calibrated and judged separately: a classifier's, hidden-state estimates at the end of a prompt, and
    those during decode.

    A request that ignores the end of sequence has a fixed length. Nothing can be learned from it, so callers must not
    pass its end to `ended`."""

    def __init__(self, own: Identity) -> None:
        assert own.expected is not None
        self.rules, self.expected = own.rules, own.expected
        self.prior = Prior(own.expected.prior, own.capacity.context)
        levels = own.expected.levels
        self.classifier = AccuracyRecord("the classifier", levels)
        self.prompt = AccuracyRecord("the hidden state", levels)
        self.later = AccuracyRecord("the hidden state during decode", levels)
        self._open: dict[str, OpenRequest] = {}
        self._ended: dict[str, None] = {}
        self._turn = self._late = self._unusable = 0

    # ------------------------------------------------------------ ranges

    def unknown(self, sampling: Sampling, outputs: int) -> LengthRange:
        """Return the range by the prior, of a request that has `outputs` tokens and continues: from requests that got
        at least this far."""
        known = fixed(sampling, outputs)
        return known if known is not None else self._by_prior(self._expected(sampling, outputs))

    def named(self, rid: str, distribution: LengthDistribution, sampling: Sampling, outputs: int) -> LengthRange:
        """Return the range by a classifier's distribution of the whole output, of which `outputs` tokens are there."""
        return self._predict(self.classifier, rid, distribution, sampling, outputs, whole=True)

    def estimates(self, rid: str, estimate: HiddenStateEstimate, sampling: Sampling) -> LengthRange:
        """Return the range by a hidden-state estimate of the remaining output."""
        accuracy = self.later if estimate.outputs else self.prompt
        return self._predict(accuracy, rid, estimate.distribution, sampling, estimate.outputs, whole=False)

    def _predict(
        self,
        accuracy: AccuracyRecord,
        rid: str,
        distribution: LengthDistribution,
        sampling: Sampling,
        outputs: int,
        *,
        whole: bool,
    ) -> LengthRange:
        known = fixed(sampling, outputs)
        if known is not None:
            return known
        expected = self._expected(sampling, outputs)
        if not usable(distribution):
            self._unusable += 1
            return self._by_prior(expected)
        most = max(sampling.max_tokens, outputs + 1)
        after = 0 if whole else outputs
        raw = curve_of(distribution, most, after=after, least=sampling.min_tokens, tail=expected)
        if whole:
            raw = survivors(raw, outputs)
        corrected = accuracy.calibration.corrected(raw)
        length = self._range(raw, corrected, accuracy) if accuracy.on else self._by_prior(expected)
        self._record(rid, accuracy, raw, corrected, expected, length.high)
        return length

    def _range(self, raw: Curve, corrected: Curve, accuracy: AccuracyRecord) -> LengthRange:
        cover = self.rules.length_cover
        high = quantile(raw, accuracy.calibration.level(cover)) if cover else None
        return range_of(corrected, self.rules.length_granularity, high)

    def _record(
        self, rid: str, accuracy: AccuracyRecord, raw: Curve, corrected: Curve, expected: Curve, high: int
    ) -> None:
        request = self._open.get(rid)
        if request is None:
            self._turn += 1
            request = self._open[rid] = OpenRequest(self._turn % TURNS)
            _drop_oldest(self._open)
        if accuracy is self.later:
            request.turns -= 1
            if request.turns != -1:
                return
        others = [prediction for prediction in request.predictions if prediction.accuracy is not accuracy]
        accuracy.predicted += len(others) == len(request.predictions)  # another attempt does not count again
        places, granularity = raw.tokens[:-1], self.rules.length_granularity
        same = places == expected.tokens[:-1]
        prior = expected.below[:-1] if same else tuple(share_below(expected, at) for at in places)
        labels = likeliest(corrected, granularity), likeliest(expected, granularity)
        request.predictions = [*others, Prediction(accuracy, raw, corrected.below[:-1], prior, *labels, high)]

    # ------------------------------------------------------------ ends

    def ended(self, rid: str, outputs: int, reason: str) -> None:
        """Learn from a request that has ended with `outputs` tokens; `reason` is "stop", or "length" when it was cut
        off. A second call for the same request has no effect."""
        if rid in self._ended:
            return
        self._ended[rid] = None
        _drop_oldest(self._ended)
        cut = reason == "length"
        self.prior.learn(outputs, cut)
        for prediction in self._open.pop(rid, OpenRequest(0)).predictions:
            self._score(prediction, outputs, cut)

    def _score(self, prediction: Prediction, outputs: int, cut: bool) -> None:
        accuracy, granularity, tokens = prediction.accuracy, self.rules.length_granularity, prediction.raw.tokens[:-1]
        if cut:
            accuracy.calibration.passed(share_below(prediction.raw, outputs))
        else:
            accuracy.calibration.came(share_below(prediction.raw, outputs + 0.5))
        accuracy.came(prediction.label, prediction.prior_label, outputs // granularity, outputs < prediction.high)
        accuracy.judge(ranked_score(tokens, prediction.below, outputs), ranked_score(tokens, prediction.prior, outputs))

    def forget(self, rid: str) -> None:
        """Forget a request that was cancelled or has failed: its length is unknown."""
        self._open.pop(rid, None)

    # ------------------------------------------------------------ status

    def late(self) -> None:
        """Count a request that was offered before its prediction arrived."""
        self._late += 1

    def status(self) -> PredictorStatus:
        """Return the status of the predictions of prompts; without any, of those during decode."""
        records = [accuracy for accuracy in (self.prompt, self.classifier, self.later) if accuracy.predicted]
        accuracy = records[0] if records else self.prompt
        notes = [self.expected.note, *(f"off: {accuracy.why_off()}" for accuracy in records if not accuracy.on)]
        if self._unusable:
            notes.append(f"{self._unusable} answers were no odds")
        return PredictorStatus(
            kind=self.expected.kind,
            on=accuracy.on and self.expected.kind != "prior",
            note="; ".join(filter(None, notes)),
            predicted=accuracy.predicted,
            late=self._late,
            scored=accuracy.scored,
            right=accuracy.right,
            prior_right=accuracy.prior_right,
            inside=accuracy.inside,
            buckets={f"{prediction} {came}": count for (prediction, came), count in sorted(accuracy.counts.items())},
        )

    def _expected(self, sampling: Sampling, outputs: int) -> Curve:
        return self.prior.curve(outputs, sampling.min_tokens, max(sampling.max_tokens, outputs + 1))

    def _by_prior(self, curve: Curve) -> LengthRange:
        cover = self.rules.length_cover
        return range_of(curve, self.rules.length_granularity, quantile(curve, cover) if cover else None)


def _drop_oldest(known: dict[str, Any]) -> None:
    while len(known) > MOST_OPEN:
        del known[next(iter(known))]
