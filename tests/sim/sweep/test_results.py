import pytest

from tetri.request import Slo
from tetri.sim.sweep.cases import Case
from tetri.sim.sweep.results import keeps, result_of
from tetri.sim.traces import Arrival

SLO = Slo(ttft_s=1.0, tpot_s=0.1)
CASE = Case("shift", "v100-opt13b", 2, "balanced", size=8)  # of this workload all requests count
GOOD, SLOW = (0.5, 0.05, 2.0), (2.0, 0.05, 3.0)


@pytest.mark.parametrize(
    ("times", "kept"), [(GOOD, True), (SLOW, False), ((0.5, 0.2, 9.0), False), (None, False), ((1.0, 0.1, 2.0), True)]
)
def test_both_limits_are_to_be_kept(times, kept):
    assert keeps(times, SLO) is kept


def test_the_attainment_is_shown_by_length():
    served = [
        (Arrival(float(i), 100 * (8 - i), 10), SLOW if i < 3 else GOOD) for i in range(8)
    ]  # the long ones are late
    result = result_of(CASE, 2.0, served, {"balanced": SLO, "loose": Slo(ttft_s=9.0, tpot_s=9.0)})
    assert result.attained["balanced"].share == 5 / 8
    assert result.attained["balanced"].quartiles == (1.0, 1.0, 0.5, 0.0)
    assert result.attained["loose"].share == 1.0
    assert (result.ttft.p50, result.ttft.mean, result.jct.p90) == (0.5, pytest.approx(8.5 / 8), 3.0)


def test_only_the_middle_of_a_run_counts():
    case = Case("Mixed", "v100-opt13b", 2, "balanced", size=20)
    served = [(Arrival(float(i), 100, 10), GOOD if 4 <= i < 19 else SLOW) for i in range(20)]
    assert result_of(case, 2.0, served, {"balanced": SLO}).attained["balanced"].share == 1.0


def test_a_run_that_was_stopped_has_no_times_and_what_did_not_end_counts_as_late():
    result = result_of(
        CASE, 2.0, [(Arrival(0.0, 100, 10), GOOD), (Arrival(1.0, 100, 10), None)], {"balanced": SLO}, True
    )
    assert result.certain and result.ttft is None and result.attained["balanced"].share == 1 / 8
