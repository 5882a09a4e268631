import pytest

from tetri.sim.sweep.search import CLOSE, GOAL, RUNG, Point, goodput, next_rate, on_ladder, slope


def searched(share_at, start, most=12, expected=1.0):
    """(the goodput that is found, the rates that were tried)"""
    points = []
    while (rate := next_rate(points, start, expected)) is not None:
        points.append(Point(rate, share_at(rate)))
        assert len(points) <= most
    return goodput(points, expected), [point.rate for point in points]


def falling(goal_at, slope):
    """The share falls with the logarithm of the rate: it is at the goal at `goal_at`."""
    return lambda rate: min(max(GOAL + slope * (1 - rate / goal_at), 0.0), 1.0)


@pytest.mark.parametrize("start", [2.0, 8.0, 10.0, 15.0, 40.0])
@pytest.mark.parametrize("slope", [0.5, 2.0, 20.0])
def test_the_goodput_is_found_in_a_few_runs(start, slope):
    found, rates = searched(falling(10.0, slope), start)
    assert found == pytest.approx(10.0, rel=0.03)
    assert len(rates) == len(set(rates)) and all(rate == pytest.approx(on_ladder(rate)) for rate in rates)


def test_a_good_start_takes_one_run():
    assert len(searched(falling(10.0, 2.0), 10.0)[1]) == 1


def test_a_run_that_was_stopped_is_only_known_to_fail():
    found, _ = searched(lambda rate: 1.0 if rate < 10 else None, 8.0)
    assert found == pytest.approx(10.0, rel=0.05)


def test_known_points_need_no_run():
    assert next_rate([Point(9.9, 0.93), Point(10.1, 0.87)], 5.0, 1.0) is None
    assert goodput([Point(9.9, 0.93), Point(10.1, 0.87)], 1.0) == pytest.approx(10.0, rel=1e-3)


def test_a_share_next_to_the_goal_is_corrected_a_little():
    assert 10 < goodput([Point(10.0, GOAL + CLOSE / 2)], 1.0) < 10 * RUNG**4
    assert goodput([], 1.0) == 0.0


@pytest.mark.parametrize("found", [0.98, 0.84])
def test_the_steeper_the_share_falls_the_nearer_is_the_next_rate(found):
    """By how much is known from the number of instances."""
    assert [slope(instances) for instances in (2, 8, 32)] == [1.0, 2.0, 4.0]
    rates = [next_rate([Point(10.0, found)], 5.0, slope(instances)) for instances in (2, 8, 32)]
    assert rates == sorted(rates, reverse=found > GOAL) and 10.0 not in rates
    stopped = [Point(10.0, 0.98), Point(12.0, None)]
    assert next_rate(stopped, 5.0, 4.0) < next_rate(stopped, 5.0, 1.0) < 12.0
