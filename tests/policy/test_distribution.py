"""What a length distribution says of one request."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tetri.policy import distribution as of_length
from tetri.policy.distribution import Curve, curve_of, likeliest, quantile, range_of, share_below, survivors
from tetri.request import LengthDistribution, LengthRange

FOUR = LengthDistribution(50, (0.1, 0.2, 0.3, 0.4))  # the last one from 150 on
TAIL = Curve((1, 150, 200, 300, 301), (0.0, 0.5, 0.75, 0.9, 1.0))


def close(numbers):
    return pytest.approx(numbers, abs=1e-12)


def pairs(curve):
    return dict(zip(curve.tokens, curve.below, strict=True))


@pytest.mark.parametrize(
    "curve, points",
    [
        # Who would write more than max_tokens is cut off there.
        (curve_of(FOUR, 120), {1: 0, 50: 0.1, 100: 0.3, 120: 0.3 + 0.3 * 0.4, 121: 1}),
        (curve_of(FOUR, 100), {1: 0, 50: 0.1, 100: 0.3, 101: 1}),
        (curve_of(FOUR, 150), {1: 0, 50: 0.1, 100: 0.3, 150: 0.6, 151: 1}),
        (curve_of(FOUR, 500), {1: 0, 50: 0.1, 100: 0.3, 150: 0.6, 500: 0.6, 501: 1}),  # the open bucket says no more
        (curve_of(FOUR, 1), {1: 0, 2: 1}),
        # What follows after some tokens.
        (curve_of(FOUR, 1000, after=30), {31: 0, 80: 0.1, 130: 0.3, 180: 0.6, 1000: 0.6, 1001: 1}),
        (curve_of(FOUR, 90, after=30), {31: 0, 80: 0.1, 90: 0.1 + 0.2 * 0.2, 91: 1}),
        # No end before min_tokens.
        (curve_of(FOUR, 120, least=70), {70: 0, 100: 0.3, 120: 0.42, 121: 1}),
        (of_length.raised(curve_of(FOUR, 120), 70), {70: 0, 100: 0.3, 120: 0.42, 121: 1}),
        (curve_of(FOUR, 120, least=120), {120: 0, 121: 1}),
        # A tail says where those of the open bucket end.
        (curve_of(FOUR, 300, tail=TAIL), {1: 0, 50: 0.1, 100: 0.3, 150: 0.6, 200: 0.8, 300: 0.92, 301: 1}),
        # Survivors are spread as all were beyond.
        (survivors(curve_of(FOUR, 300, tail=None), 99), {100: 0, 150: 0.3 / 0.7, 300: 0.3 / 0.7, 301: 1}),
        (survivors(curve_of(FOUR, 300), 124), {125: 0, 150: 0.15 / 0.55, 300: 0.15 / 0.55, 301: 1}),
    ],
)
def test_curves(curve, points):
    assert pairs(curve) == close(points)
    assert list(curve.tokens) == list(points) and of_length.raised(curve, min(points)) is curve
    assert share_below(curve, max(points)) == 1


def test_survivors_of_whom_nothing_is_known():
    short = Curve((1, 50, 300, 301), (0.0, 1.0, 1.0, 1.0))
    right = {60: (61, 300, 301), 299: (300, 301), 300: (301, 302), 800: (801, 802)}
    found = {written: survivors(short, written) for written in right}
    assert found == {written: Curve(at, (*[0.0] * (len(at) - 1), 1.0)) for written, at in right.items()}
    assert survivors(short, 0) is short


def test_quantiles_and_the_likeliest_bucket():
    right = {0: 1, 0.1: 50, 0.2: 75, 0.3: 100, 0.42: 120, 0.43: 120 + 0.01 / 0.58, 1: 121}
    assert [quantile(curve_of(FOUR, 120), share) for share in right] == pytest.approx([*right.values()])
    assert [likeliest(curve_of(FOUR, 120), granularity) for granularity in (50, 100, 200, 60)] == [2, 1, 0, 2]


@pytest.mark.parametrize(
    "curve, granularity, high, low_high",
    [
        (curve_of(FOUR, 120), 200, None, (0, 121)),
        (curve_of(FOUR, 120), 50, None, (100, 121)),
        (curve_of(FOUR, 1000), 200, None, (0, 200)),
        (survivors(curve_of(FOUR, 1000), 210), 200, None, (1000, 1001)),
        (survivors(curve_of(FOUR, 1000), 110), 100, None, (1000, 1001)),
        (survivors(curve_of(FOUR, 180), 110), 200, None, (111, 181)),
        (curve_of(FOUR, 180), 50, 180.2, (150, 181)),
        (curve_of(FOUR, 180), 50, 120.2, (100, 121)),
        (curve_of(FOUR, 180), 50, 100.0, (50, 100)),
        (curve_of(FOUR, 180), 50, 1.0, (0, 2)),
        (curve_of(FOUR, 180), 50, 900.0, (150, 181)),
        (survivors(curve_of(FOUR, 180), 110), 100, 20.0, (111, 112)),
    ],
)
def test_ranges(curve, granularity, high, low_high):
    assert range_of(curve, granularity, high) == LengthRange(low=low_high[0], high=low_high[1])


def test_what_is_no_distribution():
    nan = float("nan")
    wrong = [(), (0.5, 0.4), (1.5, -0.5), (nan, 0.5), (0.5, nan), (float("inf"), 0.0)]
    made = [FOUR, LengthDistribution(50, (1.0,)), LengthDistribution(0, (1.0,))]
    usable = [of_length.usable(each) for each in (*made, *(LengthDistribution(50, shares) for shares in wrong))]
    assert usable == [True, True, False, *[False] * len(wrong)]


def test_the_score_is_the_less_the_nearer():
    sure = [(10, 20, 30), (0.0, 1.0, 1.0)]
    assert [of_length.ranked_score(*sure, length) for length in (12, 19, 25, 31)] == [0, 0, 10, 20]
    unsure = [(10, 20, 30), (0.0, 0.5, 1.0)]
    assert [of_length.ranked_score(*unsure, length) for length in (12, 25)] == [2.5, 2.5]


def _distribution(weights, width):
    return LengthDistribution(width, tuple(weight / sum(weights) for weight in weights))


DISTRIBUTIONS = st.builds(
    _distribution,
    st.lists(st.sampled_from([0, 0, 1, 2, 3, 7, 1000]), min_size=1, max_size=12).filter(any),
    st.sampled_from([1, 2, 7, 50, 100]),
)


@st.composite
def curves(draw):
    distribution, after, more = draw(DISTRIBUTIONS), draw(st.integers(0, 300)), draw(st.integers(1, 900))
    most = after + more
    tail = None
    if draw(st.booleans()):
        tail = survivors(curve_of(draw(DISTRIBUTIONS), most), after)
    curve = curve_of(distribution, most, after=after, least=draw(st.integers(0, most)), tail=tail)
    if draw(st.booleans()):
        curve = survivors(curve, draw(st.integers(after, most - 1)))
    return curve


def valid(curve):
    assert len(curve.tokens) == len(curve.below) >= 2
    assert all(before < after for before, after in pairwise(curve.tokens))
    assert all(before <= after + 1e-12 for before, after in pairwise(curve.below))
    assert (curve.below[0], curve.below[-1]) == (0.0, 1.0)


many = settings(deadline=None, derandomize=True, max_examples=150)


@many
@given(curves(), st.integers(0, 1500), st.integers(1, 300))
def test_curves_stay_curves(curve, written, granularity):
    valid(curve)
    valid(survivors(curve, written))
    assert survivors(curve, written).tokens[0] > written or survivors(curve, written) is curve
    first, shares = of_length.by_bucket(curve, granularity)
    assert sum(shares) == close(1) and min(shares) >= -1e-12
    assert first * granularity <= curve.tokens[0] < (first + 1) * granularity
    assert (first + len(shares) - 1) * granularity < curve.tokens[-1] <= (first + len(shares)) * granularity


@many
@given(curves(), st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_more_cover_is_never_a_lower_end(curve, shares):
    ranges = [range_of(curve, 50, quantile(curve, share)) for share in sorted(shares)]
    assert [each.high for each in ranges] == sorted(each.high for each in ranges)
    for share, each in zip(sorted(shares), ranges, strict=True):
        assert share_below(curve, each.high) >= share - 1e-6
        assert curve.tokens[0] < each.high <= curve.tokens[-1] and each.low < each.high
