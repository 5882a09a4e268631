import csv
from collections import Counter

import pytest

from tetri.sim.sweep.cases import Case, cases


def test_every_workload_has_every_number_of_instances_and_regime():
    found = cases()
    assert len(found) == 6 * 2 * 4 * 3 and len({case.name for case in found}) == len(found)
    assert "Mixed/cpu-smollm2/4/balanced" in {case.name for case in found}


def test_a_third_is_held_back_and_stays_so():
    held = [case.name for case in cases() if case.held_back]
    assert 1 / 4 < len(held) / len(cases()) < 2 / 5
    assert held[:2] == ["LPHD/cpu-smollm2/2/balanced", "LPHD/cpu-smollm2/2/tight-tpot"]


def test_the_requests_are_the_same_at_every_rate():
    case = Case("Mixed", "cpu-smollm2", 2, "balanced", size=100)
    slow, fast = [*case.arrivals(1.0)], [*case.arrivals(4.0)]
    assert [(a.prompt, a.output) for a in slow] == [(a.prompt, a.output) for a in fast]
    assert [a.at_s for a in fast] == pytest.approx([a.at_s / 4 for a in slow])
    assert slow[-1].at_s == pytest.approx(100)  # 1 a second


def test_a_run_has_a_thousand_requests_an_instance():
    assert [Case("Mixed", "cpu-smollm2", n, "balanced").requests for n in (2, 8, 32)] == [4000, 8000, 32000]


def test_the_limits_are_multiples_of_an_idle_instance():
    slos = {regime: Case("HPLD", "v100-opt13b", 2, regime).slo() for regime in ("tight-ttft", "balanced", "tight-tpot")}
    base = slos["balanced"]
    for regime, ttft, tpot in (("tight-ttft", 1 / 2, 2), ("tight-tpot", 2, 2 / 3)):
        assert slos[regime].ttft_s == pytest.approx(base.ttft_s * ttft)
        assert slos[regime].tpot_s == pytest.approx(base.tpot_s * tpot)


def test_the_shift_goes_to_heavy_prompts_and_back():
    arrivals = [*Case("shift", "cpu-smollm2", 2, "balanced", size=600).arrivals(1.0)]
    thirds = Counter((int(3 * a.at_s / 600.001), a.prompt > 512) for a in arrivals)
    assert set(thirds) == {(0, False), (1, True), (2, False)}
    assert [a.at_s for a in arrivals] == sorted(a.at_s for a in arrivals)
    assert thirds[1, True] > thirds[0, False]  # they write less


def test_a_trace_is_repeated_without_what_never_fits(tmp_path):
    trace = tmp_path / "small.csv"
    with trace.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["Timestamp", "Request tokens", "Response tokens"])
        rows.writerows([(0, 100, 10), (3, 50_000, 10), (4, 200, 20)])
    (case,) = [case for case in cases([trace]) if case.name == "small/v100-opt13b/2/balanced"]
    made = [*Case(case.workload, case.cost, 2, "balanced", case.trace, size=5).arrivals(2.0)]
    assert [(a.prompt, a.output) for a in made] == [(100, 10), (200, 20), (100, 10), (200, 20), (100, 10)]
    assert made[-1].at_s == pytest.approx(4 / 2)  # mean gap 1/2 s


def test_the_bound_is_that_of_the_regime():
    bounds = [Case("LPHD", "v100-opt13b", 8, regime).bound for regime in ("tight-tpot", "balanced", "tight-ttft")]
    assert 0 < bounds[0] < bounds[1] < bounds[2]
