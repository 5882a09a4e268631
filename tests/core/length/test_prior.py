"""The lengths of all requests that end here."""

from random import Random

import pytest

from tetri.core.length.prior import MEMORY, MOST, START, Prior
from tetri.policy.distribution import likeliest, quantile, share_below
from tetri.request import LengthDistribution

FLAT = LengthDistribution(50, (0.2, 0.2, 0.2, 0.2, 0.2))  # the last one from 200 on
NOTHING = LengthDistribution(50, (1.0,))


def ends(prior, lengths, most=None):
    for length in lengths:
        cut = most is not None and length >= most
        prior.learn(most if cut else length, cut)


def drawn(seed, count, mean):
    rng = Random(seed)
    return [1 + int(rng.expovariate(1 / mean)) for _ in range(count)]


def test_before_any_traffic_it_is_what_was_known():
    curve = Prior(FLAT, 1000).curve(0, 0, 900)
    for tokens, share in ((50, 0.2), (100, 0.4), (200, 0.8)):
        assert share_below(curve, tokens) == pytest.approx(share, abs=0.01)
    assert share_below(curve, 250) > 0.8 and curve.tokens[-1] == 901


def test_with_nothing_known_all_that_is_possible():
    prior = Prior(NOTHING, 1000)
    curve = prior.curve(0, 0, 300)
    assert share_below(curve, 300) == 0 and likeliest(curve, 200) == 1
    ends(prior, [40] * MEMORY)
    assert share_below(prior.curve(0, 0, 300), 50) > 0.9


def test_who_was_cut_off_tells_of_nobody_beyond():
    """All are cut off at 200 tokens but one in five: the tail is that of those, not shortened by the many."""
    prior, rng = Prior(NOTHING, 4000), Random(2)
    for length in drawn(3, 4000, mean=300):
        most = 2000 if rng.random() < 0.2 else 200
        ends(prior, [length], most)
    curve = prior.curve(0, 0, 2000)
    for tokens in (100, 200, 400, 800):
        assert share_below(curve, tokens) == pytest.approx(1 - 2.718281828 ** (-tokens / 300), abs=0.08)


def test_cut_off_inside_a_bucket_counts_for_a_part_of_it():
    prior = Prior(NOTHING, 1000)
    for length in drawn(5, 6000, mean=100):
        ends(prior, [length], most=75)
    assert share_below(prior.curve(0, 0, 900), 100) == pytest.approx(1 - 2.718281828**-1, abs=0.06)


def test_it_follows_the_traffic_and_forgets():
    prior = Prior(FLAT, 8000)
    ends(prior, drawn(7, 4 * MEMORY, mean=100))
    assert quantile(prior.curve(0, 0, 4000), 0.5) == pytest.approx(70, abs=15)
    ends(prior, drawn(8, 3 * MEMORY, mean=900))
    assert quantile(prior.curve(0, 0, 4000), 0.5) == pytest.approx(625, rel=0.15)


def test_lengths_beyond_the_table_are_beyond_it():
    prior = Prior(NOTHING, 1_000_000)
    ends(prior, [10, 50 * MOST + 7] * 400)
    curve = prior.curve(0, 0, 500_000)
    assert share_below(curve, 50) == pytest.approx(0.5, abs=0.05)
    assert len(curve.tokens) <= MOST + 4 and share_below(curve, 50 * MOST) < 0.75


def test_for_ever():
    """The weights are brought down now and then: what it says stays the same."""
    prior, twin = Prior(FLAT, 1000), Prior(FLAT, 1000)
    rng = Random(4)
    for _ in range(750 * MEMORY):  # a weight grows by e in MEMORY ends: no number could hold it
        prior.learn(rng.randrange(1, 400), False)
    for _ in range(8 * MEMORY):
        length = rng.randrange(1, 400)
        prior.learn(length, False)
        twin.learn(length, False)
    for tokens in range(10, 400, 30):
        assert share_below(prior.curve(0, 0, 900), tokens) == pytest.approx(
            share_below(twin.curve(0, 0, 900), tokens), abs=0.01
        )


def test_what_was_known_fades():
    prior = Prior(LengthDistribution(50, (1.0, 0.0)), 1000)
    ends(prior, [120] * START)
    assert 0.35 < share_below(prior.curve(0, 0, 900), 100) < 0.6
    ends(prior, [120] * 4 * MEMORY)
    assert share_below(prior.curve(0, 0, 900), 100) < 0.05
