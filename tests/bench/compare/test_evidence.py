import pytest

from tetri.bench.compare import evidence
from tetri.bench.compare.evidence import ATTAINED, JCT, TPOT_P99, TTFT, TTFT_P99, Estimate, goodput, values
from tetri.bench.compare.load import Answer
from tetri.request import Slo

SLO = Slo(ttft_s=1.0, tpot_s=0.2)


def answers(ttfts, error_at=None):
    return [
        Answer(float(place), ttft, ttft + 1.0, 10, 11, error="cut" if place == error_at else "")
        for place, ttft in enumerate(ttfts)
    ]


def value(metric, repeats):
    return evidence.value(metric, values(metric, repeats, SLO))


def compared(metric, ours, theirs):
    return evidence.compared(metric, values(metric, ours, SLO), values(metric, theirs, SLO))


def varied(count, times=1.0):
    return answers([times * (0.5 + (7 * number % 10) / 10) for number in range(count)])


@pytest.mark.parametrize(
    ("metric", "expected"),
    [(TTFT, 2.0), (JCT, 3.0), (TPOT_P99, 0.1), (TTFT_P99, 2.98), (ATTAINED, 0.25)],
)
def test_values_are_of_all_repeats(metric, expected):
    assert value(metric, [answers([1.0, 2.0]), answers([2.0, 3.0])]) == pytest.approx(expected, abs=0.02)


def test_a_request_that_failed_keeps_no_limit_and_has_no_times():
    sample = [answers([0.5, 0.7], error_at=1)]
    assert (value(TTFT, sample), value(ATTAINED, sample)) == (0.5, 0.5)
    assert value(TTFT, [answers([0.5], error_at=0)]) is None


def test_equal_samples_are_equal_for_certain():
    sample = [varied(20), varied(20)]
    assert compared(TTFT, sample, sample) == Estimate(1.0, 1.0, 1.0)
    assert compared(ATTAINED, sample, sample) == Estimate(0.0, 0.0, 0.0)


def test_a_ratio_that_is_the_same_for_all_requests_is_certain():
    """Requests are paired: that they differ among each other does not matter."""
    made = compared(TTFT, [varied(50, 0.8)] * 3, [varied(50)] * 3)
    assert made == pytest.approx((0.8, 0.8, 0.8))


def test_an_odd_request_or_repeat_widens_the_interval():
    base = [varied(50)] * 3
    one_odd = [answers([30.0] + [each.ttft_s for each in varied(50)[1:]]), *base[1:]]
    repeats_differ = [varied(50, times) for times in (0.6, 1.0, 1.4)]
    for sample in (one_odd, repeats_differ):
        made = compared(TTFT, sample, base)
        assert made.low <= 1.0 < made.high and made.high - made.low > 0.15
        assert made.low <= made.value <= made.high


def test_attainment_is_compared_by_the_difference():
    made = compared(ATTAINED, [answers([0.5] * 90 + [2.0] * 10)], [answers([0.5] * 60 + [2.0] * 40)])
    assert made.value == pytest.approx(0.3) and 0.15 < made.low < 0.3 < made.high < 0.45


def test_times_are_compared_of_what_both_served():
    ours, theirs = [answers([1.0, 9.0, 3.0], error_at=1)], [answers([2.0, 2.0, 6.0])]
    assert compared(TTFT, ours, theirs) == Estimate(0.5, 0.5, 0.5)
    assert compared(TTFT, [answers([1.0], error_at=0)], [answers([1.0])]) == Estimate(None, None, None)


def test_the_same_samples_give_the_same_interval():
    ours, theirs = [varied(30, 0.9)], [answers([1.0] * 30)]
    assert compared(JCT, ours, theirs) == compared(JCT, ours, theirs)


@pytest.mark.parametrize(
    ("points", "rate"),
    [
        ([(1.0, 1.0), (2.0, 0.8)], 1.5),
        ([(2.0, 0.8), (1.0, 1.0)], 1.5),
        ([(1.0, 0.95), (2.0, 0.9), (3.0, 0.8)], 2.0),
        ([(1.0, 0.92), (2.0, 0.88), (3.0, 0.94), (4.0, 0.5)], 3 + 0.04 / 0.44),  # noise: the last crossing
        ([(1.0, 1.0), (2.0, 0.95)], None),
        ([(1.0, 0.8)], None),
        ([], None),
    ],
)
def test_the_highest_rate_that_attains_the_goal(points, rate):
    assert goodput(points) == (None if rate is None else pytest.approx(rate))
