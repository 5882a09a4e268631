import json
from dataclasses import replace
from math import inf

import pytest

from tetri.sim.sweep.cases import Case
from tetri.sim.sweep.explore import Standing
from tetri.sim.sweep.report import Row, as_json, checks, table, verdicts
from tetri.sim.sweep.results import Attainment, Result, Spread


def run(case, p99, quartile):
    spread = Spread(1.0, 1.0, 1.0, p99)
    return Result(1.0, {case.regime: Attainment(0.9, (1.0, 1.0, 0.9, quartile))}, spread, spread, spread)


def row(auto, split=0.5, p99=1.0, quartile=0.85, workload="LPLD", instances=8, regime="balanced"):
    case = Case(workload, "v100-opt13b", instances, regime)
    fixed = [
        Standing("coupled-ll-512", 1.0, near=run(case, 1.0, 0.9)),
        Standing("split-1+7-512", split),
        Standing("coupled-rr-512", None, "not the best: fails at 1/s"),
    ]
    auto = Standing("auto", auto, near=run(case, 9.0, quartile), beside=run(case, p99, 0.0))
    return Row(case, fixed, auto)


def found(rows, held_back=()):
    return {check.promise.split(":")[0]: check for check in checks(rows, held_back)}


def test_a_row_compares_auto_with_the_best_fixed_arrangement():
    made = row(1.1, p99=3.0)
    assert (made.best.arrangement, made.ratio, made.tail) == ("coupled-ll-512", 1.1, 3.0)
    assert made.worst_quartile == 0.85 and made.of_bound == 1.1 / made.case.bound
    assert made.over("split") == pytest.approx(2.2) and made.over("coupled-ll") == 1.1


def test_the_claims_hold_or_fail():
    good, bad = found([row(1.05)] * 10), found([row(1.05)] * 8 + [row(0.95), row(0.5, p99=2.0, quartile=0.1)])
    assert good["auto >= 0.97 x best fixed"].holds and not bad["auto >= 0.97 x best fixed"].holds
    assert bad["auto >= 0.97 x best fixed"].value == pytest.approx(0.8)
    assert bad["auto >= 0.92 x best fixed"].value == pytest.approx(0.9)
    for claim in ("every quartile of length attains 0.80", "p99 TTFT <= 1.5 x best fixed, at its rate"):
        assert good[claim].holds and not bad[claim].holds
    assert good["mean of auto / best fixed"].value == pytest.approx(1.05)


def test_a_tail_that_is_not_known_is_no_good_one():
    made = row(1.0)
    assert replace(made, auto=replace(made.auto, beside=None)).tail == inf


def test_a_claim_about_no_case_is_left_out():
    claims = found([row(1.0, instances=2, regime="tight-ttft")])
    assert not [claim for claim in claims if "balanced" in claim or "bound" in claim or "shift" in claim]


def test_a_load_that_shifts_has_its_own_claims():
    made = checks([row(1.0, split=0.95, workload="shift")])
    verdict = {check.promise: check.holds for check in made if check.promise.startswith("shift")}
    assert verdict == {"shift: auto >= 1.1 x best split": False, "shift: auto >= 1.0 x coupled least-loaded": True}


@pytest.mark.parametrize(("ratio", "holds"), [(1.04, True), (0.99, False)])
def test_cases_that_were_held_back_should_be_like_the_others(ratio, holds):
    assert found([row(1.05)], [row(ratio)])["held-back cases"].holds is holds


def test_the_report_names_case_and_arrangement():
    lines = [*table([row(1.1)]), *verdicts(checks([row(1.1)]))]
    assert "LPLD/v100-opt13b/8/balanced" in lines[1] and "coupled-ll-512" in lines[1] and "1.100" in lines[1]
    assert lines[2].startswith("holds  auto >= 0.97")
    made = json.loads(json.dumps(as_json(row(1.1))))
    assert made["ratio"] == 1.1 and made["arrangements"][2]["why"] == "not the best: fails at 1/s"
