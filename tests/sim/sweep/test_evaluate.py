import pytest

from tetri.sim.sweep.arrangements import named
from tetri.sim.sweep.cases import REGIMES, Case
from tetri.sim.sweep.evaluate import evaluate

CASE = Case("LPLD", "v100-opt13b", 2, "balanced", size=120)
NAMES = ["coupled-rr-512", "coupled-ll-256", "split-1+1-512", "auto"]


@pytest.mark.parametrize("name", NAMES)
def test_requests_keep_the_limits_under_a_slow_load(name):
    result = evaluate(CASE, named(name, 2), rate=0.2)
    assert {*result.attained} == ({"balanced"} if name == "auto" else {*REGIMES})
    # An output of two tokens by a split has one TPOT: a decode step and the time that its KV moves.
    assert all(each.share >= 0.95 and min(each.quartiles) >= 0.9 for each in result.attained.values())
    slo = CASE.slo()
    assert result.ttft.p99 < slo.ttft_s / 6 * 1.5 and result.tpot.mean < slo.tpot_s
    assert result.jct.p50 > result.ttft.p50 and not result.certain


@pytest.mark.parametrize("name", NAMES)
def test_hardly_any_keeps_them_under_a_load_that_is_too_much(name):
    result = evaluate(CASE, named(name, 2), rate=200.0)
    assert result.attained["balanced"].share < 0.3
    assert all(0 <= share < 0.6 for share in result.attained["balanced"].quartiles)


def test_a_run_stops_when_its_result_is_certain():
    whole = evaluate(CASE, named("auto", 2), rate=200.0)
    cut = evaluate(CASE, named("auto", 2), rate=200.0, least=0.9)
    assert cut.certain and cut.ttft is None and cut.attained["balanced"].share < 0.9
    assert not whole.certain and whole.attained["balanced"].share < 0.9


def test_a_run_that_may_attain_it_does_not_stop():
    assert evaluate(CASE, named("auto", 2), rate=0.2, least=0.9).attained["balanced"].share == 1.0
