"""What a worker makes of a predictor's odds."""

import pickle

import pytest

from tests.core.build import capacity, identity
from tetri.core.broker.delivery import Limits
from tetri.core.length import estimator as estimators
from tetri.core.length.accuracy import LEAST
from tetri.core.length.estimator import TURNS, LengthEstimator
from tetri.engine_request import HiddenStateEstimate
from tetri.policy.rules import Rules
from tetri.request import Expected, LengthDistribution, Sampling

WIDTH, BUCKETS = 50, 20
PRIOR = LengthDistribution(WIDTH, (0.2, 0.2, 0.2, 0.2, *[0.2 / 16] * 16))
SAMPLING = Sampling(max_tokens=900)


def at(*labels, width=WIDTH):
    """Odds that are sure of these buckets."""
    return LengthDistribution(width, tuple(labels.count(label) / len(labels) for label in range(BUCKETS)))


def estimator(kind="hidden", levels=(), prior=PRIOR, **rules):
    rules = Rules(length="trained", **{"length_granularity": 100, **rules})
    expected = Expected(kind, prior, levels, "made up")
    return LengthEstimator(identity("p1", "prefill", rules=rules, expected=expected, capacity=capacity(context=2000)))


def told(distribution, outputs=0):
    return HiddenStateEstimate("key", outputs, distribution)


def span(length):
    return length.low, length.high


def test_the_likeliest_bucket_of_whoever_says_it():
    view = estimator()
    assert span(view.named("a", at(6, 6, 6, 2), SAMPLING, 0)) == (300, 400)
    assert span(view.estimates("a", told(at(6, 6, 6, 2)), SAMPLING)) == (300, 400)
    assert span(view.estimates("a", told(at(6, 6, 6, 2), 210), SAMPLING)) == (500, 600)
    assert span(view.named("a", at(6, 6, 6, 2), SAMPLING, 360)) == (900, 901)  # nobody knew of more than 350
    assert span(view.unknown(SAMPLING, 0)) == (0, 100)


def test_max_tokens_min_tokens_and_what_is_written():
    view = estimator()
    assert span(view.estimates("a", told(at(6)), Sampling(max_tokens=128))) == (100, 129)
    assert span(view.estimates("a", told(at(1)), Sampling(max_tokens=900, min_tokens=400))) == (400, 500)
    assert span(view.unknown(Sampling(max_tokens=120), 119)) == (120, 121)
    assert span(view.unknown(Sampling(max_tokens=120), 500)) == (501, 502)
    assert view.unknown(SAMPLING, 450).low >= 400 and view.unknown(SAMPLING, 450).high > 451


def test_cover_asks_for_a_high_end_that_is_rarely_passed():
    wide = at(*range(10))
    ends = [estimator(length_cover=cover).estimates("a", told(wide), SAMPLING).high for cover in (0.5, 0.8, 0.95)]
    assert ends == pytest.approx([250, 400, 475], abs=15)
    assert estimator(length_cover=0.7).unknown(SAMPLING, 0).high == pytest.approx(175, abs=10)


def test_what_ends_is_counted_once():
    view = estimator(length_cover=0.9)
    view.estimates("a", told(at(6)), SAMPLING)
    view.estimates("b", told(at(0)), SAMPLING)
    for rid, outputs in (("a", 320), ("b", 480), ("a", 320), ("stranger", 70)):
        view.ended(rid, outputs, "stop")
    status = view.status()
    assert (status.predicted, status.scored, status.right, status.inside) == (2, 2, 1, 1)
    assert (status.kind, status.on, status.note, status.prior_right) == ("hidden", True, "made up", 0)
    assert status.buckets == {"0 4": 1, "3 3": 1}


def test_the_first_of_two_natural_ends_teaches():
    view, twin = estimator(), estimator()
    for number in range(300):
        for each in (view, view, twin):
            each.ended(str(number), 777, "stop")
    assert view.prior.curve(0, 0, 900) == twin.prior.curve(0, 0, 900)
    assert span(view.unknown(SAMPLING, 0)) == (700, 800)


def test_one_that_is_worse_than_the_prior_is_switched_off_and_says_so():
    view = estimator()
    for number in range(200):  # lengths that it cannot tell apart, and is sure of: each time the other one
        label = (number % 2) * 6 + 1
        view.estimates(str(number), told(at(label)), SAMPLING)
        view.ended(str(number), 370 if label == 1 else 70, "stop")
    status = view.status()
    assert not status.on and status.note.startswith("made up; off: the hidden state did worse than the prior by ")
    assert view.estimates("x", told(at(10)), SAMPLING) == view.unknown(SAMPLING, 0)
    before = status.predicted
    for number in range(200, 500):
        label = (number % 2) * 6 + 1
        view.estimates(str(number), told(at(label)), SAMPLING)
        view.ended(str(number), 370 if label == 7 else 70, "stop")
    assert view.status().on and view.status().predicted == before + 301
    assert view.estimates("y", told(at(7)), SAMPLING) != view.unknown(SAMPLING, 0)


def test_each_kind_of_answer_is_judged_by_itself():
    view = estimator("both")
    for number in range(2 * LEAST):
        short = number % 2
        view.named(str(number), at(1 if short else 7), SAMPLING, 0)
        view.estimates(str(number), told(at(7 if short else 1)), SAMPLING)
        view.ended(str(number), 370 if short else 70, "stop")
    status = view.status()  # of the hidden state
    assert (status.scored, status.on) == (2 * LEAST, True)
    assert "off: the classifier" in status.note and "off: the hidden" not in status.note


def test_of_the_re_estimates_one_is_scored_by_turns():
    """Which one does not depend on how many there are, or the long ones would be scored by other odds."""
    view = estimator()
    for number in range(4 * TURNS):
        for turn in range(number % 5):
            view.estimates(str(number), told(at(1), 50 * (turn + 1)), SAMPLING)
        view.ended(str(number), 250, "stop")
    assert 0 < view.status().scored < 4 * TURNS


def test_what_is_no_odds_is_said_and_not_used():
    view = estimator()
    assert view.named("a", LengthDistribution(50, (float("nan"),) * 4), SAMPLING, 0) == view.unknown(SAMPLING, 0)
    assert view.status().note == "made up; 1 answers were no odds" and view.status().predicted == 0


def test_another_attempt_is_the_same_request():
    view = estimator()
    for _ in range(3):
        view.estimates("a", told(at(6)), SAMPLING)
    view.ended("a", 320, "stop")
    assert view.status().predicted == view.status().scored == 1


@pytest.fixture
def few(monkeypatch):
    """It remembers so many only, not twice as many as a broker has open."""
    assert 2 * Limits(context=2000, vocabulary=1).max_open == estimators.MOST_OPEN
    monkeypatch.setattr(estimators, "MOST_OPEN", 50)
    return 50


def test_memory_is_bounded(few):
    view, sizes = estimator(), []
    for number in range(40 * few):
        view.ended(f"ended {number:4}", 30, "stop")
        if number in (2 * few, 40 * few - 1):
            sizes.append(len(pickle.dumps(view)))
    assert sizes[1] < 1.2 * sizes[0]


def test_the_oldest_of_too_many_are_not_judged(few):
    view = estimator()
    for number in range(few + 1):
        view.estimates(f"open {number}", told(at(1)), SAMPLING)
    for number, scored in ((0, 0), (1, 1), (few, 2)):
        view.ended(f"open {number}", 30, "stop")
        assert view.status().scored == scored
