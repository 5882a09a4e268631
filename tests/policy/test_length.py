"""What is known of a request's length, and what follows from it."""

from collections import Counter
from random import Random

import pytest

from tetri.policy import length
from tetri.policy.length import bucket, end_of, heavy, moved_up, noisy, oracle
from tetri.policy.rules import LENGTHS, Rules
from tetri.request import LengthRange, Sampling

FIXED = Sampling(max_tokens=1000, ignore_eos=True)


def labels(rules, tokens, draws, seed=5):
    rng, sampling = Random(seed), Sampling(max_tokens=tokens, ignore_eos=True)
    ranges = [noisy(9, sampling, rules, rng) for _ in range(draws)]
    assert all(each.high - each.low == rules.length_granularity for each in ranges)
    return [each.low // rules.length_granularity for each in ranges]


def test_noisy_labels_are_those_of_the_seed_and_wrong_ones_the_nearer_the_likelier_on_both_sides():
    assert all(LENGTHS[name](9, Sampling(max_tokens=50), Rules(), Random(1)) is None for name in LENGTHS)
    assert length.none(9, FIXED, Rules(), Random(1)) is None
    assert oracle(9, FIXED, Rules(), Random(1)) == LengthRange(low=1000, high=1001)
    assert set(labels(Rules(length_granularity=100, length_accuracy=1.0), 1000, 50)) == {10}
    assert set(labels(Rules(length_granularity=100, length_accuracy=1.0), 999, 50)) == {9}
    assert bucket(9, 100) == LengthRange(low=900, high=1000)
    counts = Counter(labels(Rules(length_accuracy=0.0), 20, 500))
    assert min(counts) == 1  # zero is right, and below there is nothing
    assert min(labels(Rules(length_accuracy=0.0), 300, 500)) == 0
    assert labels(Rules(), 700, 100) == labels(Rules(), 700, 100) != labels(Rules(), 700, 100, seed=6)
    draws = 20_000
    counts = Counter(label - 50 for label in labels(Rules(length_granularity=20), 1000, draws))
    assert counts[0] / draws == pytest.approx(0.749, abs=0.01)
    wrong = draws - counts[0]
    for far, share in ((1, 0.5), (2, 0.25), (3, 0.125)):
        assert (counts[far] + counts[-far]) / wrong == pytest.approx(share, abs=0.015)
    assert counts[1] == pytest.approx(counts[-1], rel=0.1)


def test_a_request_that_outlives_its_range_is_moved_up():
    moved = {(0, 200, 199): (0, 200), (0, 200, 200): (200, 400), (0, 200, 399): (200, 400), (0, 200, 400): (400, 600)}
    for (low, high, outputs), right in {**moved, (200, 400, 1000): (1000, 1200), (7, 8, 12): (12, 13)}.items():
        before = LengthRange(low=low, high=high)
        after = moved_up(before, outputs)
        assert (after.low, after.high) == right and (after is before) == (right == (low, high))


@pytest.mark.parametrize("end, tokens, possible", [("low", 200, 1), ("middle", 299, 500), ("high", 399, 1000)])
def test_the_ends_of_a_range_and_without_one_of_what_is_possible(end, tokens, possible):
    assert end_of(LengthRange(low=200, high=400), end, 1000) == tokens
    assert end_of(LengthRange(low=200, high=400), end, 50) == 50
    assert end_of(LengthRange(low=300, high=301), end, 1000) == 300
    assert end_of(LengthRange(low=0, high=1), end, 1000) == 1  # nobody ends before the first token
    assert end_of(None, end, 1000) == possible and end_of(None, end, 1) == 1


def test_heavy_by_the_middle_of_the_range():
    assert [heavy(bucket(label, 200), 128, most=2000) for label in (0, 1, 4)] == [False, True, True]
    assert not any(heavy(bucket(label, 200), 128, most=128) for label in (0, 1, 4)) and not heavy(None, 128, most=2000)
    assert heavy(LengthRange(low=129, high=130), 128, most=2000)
