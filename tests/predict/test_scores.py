"""Scores, each against a case that can be done by hand."""

import numpy as np
import pytest

from tetri.predict import scores

SHARES = np.array([[0.1, 0.6, 0.3, 0.0], [0.5, 0.1, 0.15, 0.25]])  # buckets of 100, the last from 300 on


def test_accuracy_when_buckets_are_merged_and_quantiles_within_them():
    assert scores.merged(SHARES, 100, 200) == pytest.approx(np.array([[0.7, 0.3], [0.6, 0.4]]))
    assert scores.merged(SHARES, 100, 300) == pytest.approx(np.array([[1.0, 0.0], [0.75, 0.25]]))
    tokens = np.array([150, 250])
    assert [scores.accuracy(SHARES, tokens, 100, width) for width in (100, 200)] == [0.5, 0.5]  # the first
    assert scores.accuracy(SHARES, np.array([100, 199]), 100, 200) == 1.0
    far = np.array([[0.0, 0.0, 0.0, 1.0]])
    assert scores.accuracy(far, np.array([1000]), 100, 100) == 1.0  # the last bucket is open
    assert scores.quantiles(SHARES, 100, 0.5, 1024) == pytest.approx([100 + 100 * 0.4 / 0.6, 100.0])
    assert scores.quantiles(SHARES, 100, 0.05, 1024) == pytest.approx([50.0, 10.0])
    assert scores.quantiles(SHARES, 100, 0.95, 1024)[1] == 1024
    assert scores.means(np.array([[0.5, 0.5, 0.0]]), 100, 250) == pytest.approx([100.0])
    assert scores.means(np.array([[0.0, 0.0, 1.0]]), 100, 1024) == pytest.approx([1024.0])


def test_calibration_error_and_tau_by_counting_pairs():
    sure = np.array([[0.8, 0.2]] * 10)
    right_in_8 = np.array([10] * 8 + [250] * 2)
    assert scores.calibration_error(sure, right_in_8, 200, 200) == pytest.approx(0.0)
    assert scores.calibration_error(sure, np.array([10] * 3 + [250] * 7), 200, 200) == pytest.approx(0.5)
    tokens = np.array([1, 2, 3, 4])
    taus = {(1, 2, 3, 4): 1.0, (4, 3, 2, 1): -1.0, (1, 2, 4, 3): 4 / 6, (7, 7, 7, 7): 0.0}
    taus[1, 1, 2, 3] = 5 / (5 * 6) ** 0.5  # two ties in the guess: of 6 pairs 1 is tied there, 5 agree
    assert [scores.tau(np.array(guess, float), tokens) for guess in taus] == pytest.approx([*taus.values()])
    found = scores.guessed(np.array([150.0, 1024.0, -3.0]), np.array([199, 1024, 5]), 1024)
    assert found["100"] == 1.0 and found["mae"] == pytest.approx((49 + 0 + 8) / 3, abs=0.06)
    assert found["tau"] == pytest.approx(1.0)


def test_the_ranked_score_is_least_for_the_truth():
    one = np.array([[0.0, 1.0, 0.0]])
    assert scores.ranked(one, np.array([150]), 100) == 0.0
    assert scores.ranked(one, np.array([50]), 100) == 100.0  # a bucket away
    assert scores.ranked(one, np.array([250]), 100) == 100.0
    drawn = np.random.default_rng(0).choice([50, 150, 250], 4000, p=[0.2, 0.5, 0.3])
    truth, other = np.array([[0.2, 0.5, 0.3]] * 4000), np.array([[0.3, 0.4, 0.3]] * 4000)
    assert scores.ranked(truth, drawn, 100) < scores.ranked(other, drawn, 100)


def test_the_ceiling_counts_agreement_between_texts_of_a_prompt():
    same = scores.ceiling({"a": [10, 20], "b": [500, 510], "alone": [7]}, 1024)
    assert (same["prompts"], same["texts"]) == (2, 4)
    assert same["another"]["100"] == same["others"]["200"] == same["at_most"]["400"] == 1.0
    assert same["another"]["mae"] == 10.0 and same["another"]["tau"] == 1.0
    # Of three, two are in one bucket: of 6 ordered pairs 2 agree; two of three are in the likeliest one; of the others
    # of a text the likeliest is: for the odd one wrong, for the two either, by chance.
    two_of_three = scores.ceiling({"a": [10, 20, 950]}, 1024)
    assert two_of_three["another"]["100"] == pytest.approx(1 / 3, abs=1e-4)
    assert two_of_three["at_most"]["100"] == pytest.approx(2 / 3, abs=1e-4)
    assert two_of_three["others"]["100"] == pytest.approx((0.5 + 0.5) / 3, abs=1e-4)
    assert scores.ceiling({"a": [10]}, 1024) == {}
    dice = np.random.default_rng(1)
    found = scores.ceiling({str(key): dice.integers(1, 1025, 4).tolist() for key in range(50)}, 1024)
    for g in ("100", "200", "400"):
        assert found["another"][g] <= found["at_most"][g] and found["others"][g] <= found["at_most"][g]
