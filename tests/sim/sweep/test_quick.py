import pytest

from tetri.metrics import percentile
from tetri.sim.sweep.arrangements import named
from tetri.sim.sweep.cases import Case
from tetri.sim.sweep.evaluate import evaluate
from tetri.sim.sweep.quick import both_phases, tandem

CASE = Case("Mixed", "v100-opt13b", 2, "balanced", size=200)


def test_a_coupled_run_has_the_time_of_one_request_by_itself():
    case = Case("LPLD", "v100-opt13b", 2, "balanced", size=20)
    for arrival, (ttft_s, tpot_s, jct_s) in both_phases(case, named("coupled-rr-512", 2), 0.01):
        assert ttft_s < case.slo().ttft_s / 6 * 1.2
        assert jct_s == pytest.approx(ttft_s + (arrival.output - 1) * tpot_s)


def test_least_loaded_is_better_than_going_around():
    shares = [evaluate(CASE, named(f"coupled-{how}-512", 2), 2.0).ttft.p99 for how in ("ll", "rr")]
    assert shares[0] < shares[1]


@pytest.mark.parametrize("rate", [0.5, 1.0])
def test_the_estimate_of_a_split_is_near_the_live_cores_and_not_worse(rate):
    split = named("split-1+1-512", 2)
    live, estimate = evaluate(CASE, split, rate), evaluate(CASE, split.estimate, rate)
    assert estimate.attained["balanced"].share >= live.attained["balanced"].share - 0.02
    assert estimate.ttft.mean == pytest.approx(live.ttft.mean, rel=0.1)
    assert estimate.tpot.mean == pytest.approx(live.tpot.mean, rel=0.1)


def test_an_estimate_serves_every_request():
    served = tandem(CASE, named("split-1+1-256", 2), 1.0)
    assert len(served) == 200 and percentile([times[2] for _, times in served], 1.0) < 1000
