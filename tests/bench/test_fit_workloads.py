"""tools/fit_workloads: its arithmetic, and that it finds again what a simulated run was made with."""

import math
import tomllib

import pytest

from tetri import cost
from tetri.bench import fit_workloads
from tetri.policy.coupled import CoupledLimits
from tetri.sim import coupled, workloads


def test_a_digitised_cdf_becomes_samples():
    # as the paper's: it begins at the smallest value, steps of 1/4, the last one is left out
    points = [[1.0, 0.0], [1.0, 0.25], [2.0, 0.25], [2.0, 0.7501], [5.0, 0.7501]]
    assert fit_workloads.samples({"points": points}, 4) == [1.0, 1.0, 2.0, 2.0]


def test_lone_prefills_are_those_that_follow_an_end():
    firsts = [1.0, 1.0, 2.1, 3.3, 3.3, 4.2]
    ends = [2.0, 3.0, 4.0]
    assert fit_workloads.lone_prefill(firsts, ends) == pytest.approx(0.15)  # 2.1 and 4.2; two came at 3.3


def test_the_fit_finds_the_means_of_a_simulated_run_again(monkeypatch):
    monkeypatch.setattr(fit_workloads, "STEPS", 3)
    evaluation, table = workloads.load(), cost.load("v100-opt13b")
    baseline, name = evaluation.baseline, "LPHD"
    file = tomllib.loads(workloads.default_file().read_text(encoding="utf-8"))
    limits = CoupledLimits(baseline.slots, baseline.step_tokens, table.kv_tokens)
    batch = evaluation.workloads[name].draw(1)
    served = coupled.run("prefill_first", limits, table, batch, 1, baseline.join_s).served
    wanted = fit_workloads.statistics([request.ttft_s for request in served], [request.jct_s for request in served])
    found = fit_workloads.posterior(name, wanted, file, baseline, table, draws=8)
    rows = file["workload"][name]
    assert found.prompt_mean == pytest.approx(rows["prompt_mean"], rel=0.3)
    assert found.output_mean == pytest.approx(rows["output_mean"], rel=0.15)
    assert found.chi_squared < 8 and math.isfinite(found.log_evidence)
    assert min(found.prompt_stdev, found.output_stdev) >= 0
