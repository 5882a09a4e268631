import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from observations import histogram

from tetri.metrics import Summary, added, attainment, gained, percentile, summarise

numbers = st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=50)


@given(numbers, st.floats(0, 1))
def test_percentiles_are_numpys(values, share):
    assert math.isclose(percentile(values, share), np.percentile(values, share * 100), rel_tol=1e-9, abs_tol=1e-6)


def test_a_summary():
    found = summarise(range(101))
    assert found == Summary(count=101, mean=50, least=0, p50=50, p90=90, p99=99, most=100)
    assert summarise([2.5]) == Summary(1, 2.5, 2.5, 2.5, 2.5, 2.5, 2.5)


@pytest.mark.parametrize(("values", "says"), [([], "no values"), ([1.0, math.nan], "NaN")])
def test_what_cannot_be_summarised(values, says):
    with pytest.raises(ValueError, match=says):
        summarise(values)


@pytest.mark.parametrize("share", [-0.1, 1.1, 50, math.nan])
def test_shares_are_from_0_to_1(share):
    with pytest.raises(ValueError, match="from 0 to 1"):
        percentile([1.0], share)


@pytest.mark.parametrize(
    ("counts", "half", "most"),
    [
        ((4, 0, 0, 0), 0.5, 0.99),
        ((0, 0, 4, 0), 3.0, 3.98),
        ((50, 0, 50, 0), 1.0, 3.96),
        ((0, 0, 0, 3), 4.0, 4.0),
        ((98, 0, 0, 2), 50 / 98, 4.0),
    ],
)
def test_percentiles_lie_within_their_buckets(counts, half, most):
    assert added(None, histogram(*counts)).percentiles() == pytest.approx((half, most))


def test_nothing_is_added_to_a_histogram_that_is_not_there_or_has_not_changed():
    full = histogram(1, 0, 0, 0, total=0.5)
    assert added(None, None) is None and added(full, full) is None
    new = added(full, histogram(2, 1, 0, 0, total=2.5))
    assert (new.count, new.mean()) == (2, 1.0)


def test_counters_grow_from_where_they_were():
    assert gained({"met": 3, "ttft": 1}, {"met": 5, "ttft": 1, "tpot": 2}) == {"met": 2, "ttft": 0, "tpot": 2}


@pytest.mark.parametrize(
    ("results", "share"), [({}, None), ({"met": 0}, None), ({"met": 3, "both": 1}, 0.75), ({"tpot": 2}, 0)]
)
def test_attainment_is_the_share_that_kept_both_limits(results, share):
    assert attainment(results) == share
