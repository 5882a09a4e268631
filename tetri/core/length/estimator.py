"""What a worker makes of a predictor's odds: ranges, corrected by the lengths that came, or the prior's ranges while
these are better."""

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

#: Requests of which it is remembered what was said of them, or that they have ended; the oldest are forgotten. Twice
#: what a broker has open at most by default: those that wait are among them, and with room for fewer than wait none
#: would be remembered until its end.
MOST_OPEN = 8192
#: Of each request one of its first so many re-estimates is scored: which one goes by turns, and not by its length.
TURNS = 8


@dataclass(slots=True)
class Prediction:
    """What was said of a request, at the time. `below` and `prior`: shares below each of `raw.tokens` but the last, as
    corrected and by the prior."""

    accuracy: AccuracyRecord
    raw: Curve
    below: tuple[float, ...]
    prior: tuple[float, ...]
    label: int
    prior_label: int
    high: int


@dataclass(slots=True)
class Open:
    """A request that has not ended. `turns`: re-estimates until the one that is scored."""

    turns: int
    predictions: list[Prediction] = field(default_factory=list)


class LengthEstimator:
    """One per worker, in which both halves learn. `prior`: of all that end here. Three kinds of answers are corrected
    and judged, each by itself: a classifier's, a hidden state's at the end of a prompt, and those during decode.

    A request that ignores the end of sequence has the length that it asks for; nothing can be learned from it, and
    nobody should tell of its end."""

    def __init__(self, own: Identity) -> None:
        assert own.expected is not None
        self.rules, self.expected = own.rules, own.expected
        self.prior = Prior(own.expected.prior, own.capacity.context)
        levels = own.expected.levels
        self.classifier = AccuracyRecord("the classifier", levels)
        self.prompt = AccuracyRecord("the hidden state", levels)
        self.later = AccuracyRecord("what is said during decode", levels)
        self._open: dict[str, Open] = {}
        self._ended: dict[str, None] = {}
        self._turn = self._late = self._unusable = 0

    # ------------------------------------------------------------ ranges

    def unknown(self, sampling: Sampling, outputs: int) -> LengthRange:
        """By the prior, of a request that has `outputs` tokens and goes on: a new one, or one that has outlived what
        was said of it, by those who went on as far."""
        known = fixed(sampling, outputs)
        return known if known is not None else self._by_prior(self._expected(sampling, outputs))

    def named(self, rid: str, distribution: LengthDistribution, sampling: Sampling, outputs: int) -> LengthRange:
        """By a classifier's odds of the whole output, of which `outputs` tokens are there."""
        return self._predict(self.classifier, rid, distribution, sampling, outputs, whole=True)

    def estimates(self, rid: str, estimate: HiddenStateEstimate, sampling: Sampling) -> LengthRange:
        """By a hidden state's odds of what follows."""
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
        self._remember(rid, accuracy, raw, corrected, expected, length.high)
        return length

    def _range(self, raw: Curve, corrected: Curve, accuracy: AccuracyRecord) -> LengthRange:
        cover, high = self.rules.length_cover, None
        if cover:
            high = quantile(raw, accuracy.calibration.level(cover))
        return range_of(corrected, self.rules.length_granularity, high)

    def _remember(
        self, rid: str, accuracy: AccuracyRecord, raw: Curve, corrected: Curve, expected: Curve, high: int
    ) -> None:
        waits = self._open.get(rid)
        if waits is None:
            self._turn += 1
            waits = self._open[rid] = Open(self._turn % TURNS)
            _keep(self._open)
        if accuracy is self.later:
            waits.turns -= 1
            if waits.turns != -1:
                return
        others = [prediction for prediction in waits.predictions if prediction.accuracy is not accuracy]
        accuracy.predicted += len(others) == len(waits.predictions)  # another attempt is the same request
        places, granularity = raw.tokens[:-1], self.rules.length_granularity
        same = places == expected.tokens[:-1]
        prior = expected.below[:-1] if same else tuple(share_below(expected, at) for at in places)
        labels = likeliest(corrected, granularity), likeliest(expected, granularity)
        waits.predictions = [*others, Prediction(accuracy, raw, corrected.below[:-1], prior, *labels, high)]

    # ------------------------------------------------------------ ends

    def ended(self, rid: str, outputs: int, reason: str) -> None:
        """It has ended by itself with so many output tokens: "stop", or cut off by its "length". Told twice, it counts
        once."""
        if rid in self._ended:
            return
        self._ended[rid] = None
        _keep(self._ended)
        cut = reason == "length"
        self.prior.learn(outputs, cut)
        waits = self._open.pop(rid, None)
        for prediction in waits.predictions if waits is not None else ():
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
        """It is over, and nobody knows how long it would have been."""
        self._open.pop(rid, None)

    # ------------------------------------------------------------ what it says of itself

    def late(self) -> None:
        """A request went on before its prediction came."""
        self._late += 1

    def status(self) -> PredictorStatus:
        """Of the answers that prompts got; on an instance without prompts, of those during decode."""
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


def _keep(known: dict[str, Any]) -> None:
    while len(known) > MOST_OPEN:
        del known[next(iter(known))]
