"""Whether a predictor's answers are worth using."""

from random import Random

from tetri.core.length.accuracy import LABELS, LEAST, WINDOW, AccuracyRecord


def judged(accuracy, gains, prior=100.0):
    """After how many it switched, for each time that it did."""
    switched = []
    for number, gain in enumerate(gains, start=1):
        before = accuracy.on
        accuracy.judge(prior - gain, prior)
        if accuracy.on != before:
            switched.append(number)
    return switched


def noisy(mean, spread, count, seed=1):
    rng = Random(seed)
    return [rng.gauss(mean, spread) for _ in range(count)]


def test_it_is_off_when_it_is_worse_and_on_when_it_is_better():
    accuracy = AccuracyRecord("it", ())
    assert judged(accuracy, noisy(20, 60, 500)) == [] and accuracy.on
    (off,) = judged(accuracy, noisy(-20, 60, 500))
    assert LEAST < off < 2 * WINDOW and not accuracy.on
    assert accuracy.why_off().startswith("it did worse than the prior by ")
    (on,) = judged(accuracy, noisy(20, 60, 500))
    assert LEAST < on < 2 * WINDOW and accuracy.on


def test_a_few_ends_say_nothing():
    accuracy = AccuracyRecord("it", ())
    assert judged(accuracy, [-50.0] * (LEAST - 1)) == [] and judged(accuracy, [-50.0]) == [1]


def test_what_may_be_chance_switches_nothing():
    assert judged(AccuracyRecord("it", ()), noisy(-2, 400, 200)) == []


def test_what_does_not_matter_switches_nothing():
    accuracy = AccuracyRecord("it", ())
    assert judged(accuracy, [-0.9] * 1000) == []
    assert judged(accuracy, [-1.1] * 1000) and judged(accuracy, [0.9] * 1000) == []


def test_counts():
    accuracy = AccuracyRecord("it", ())
    for label, prior, bucket, inside in ((1, 0, 1, True), (0, 0, 0, True), (0, 2, 2, False), (99, 0, 40, True)):
        accuracy.came(label, prior, bucket, inside)
    assert (accuracy.scored, accuracy.right, accuracy.prior_right, accuracy.inside) == (4, 2, 2, 3)
    assert accuracy.counts == {(1, 1): 1, (0, 0): 1, (0, 2): 1, (LABELS - 1, LABELS - 1): 1}
