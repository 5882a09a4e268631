import pytest

from tetri.sim.sweep.cases import REGIMES, Case
from tetri.sim.sweep.sweep import sweep

CASES = [Case("LPLD", "v100-opt13b", 2, regime, size=60) for regime in REGIMES][:2]


def test_a_sweep_finds_the_goodputs_and_a_second_one_runs_nothing(tmp_path):
    path, parts = tmp_path / "sweep.jsonl", []
    rows = sweep(CASES, path, 1, parts.append)
    assert [row.case for row in rows] == CASES and parts[-1] == 2 * len(CASES)
    for row in rows:
        assert 0.3 < row.ratio < 2 and 0 < row.of_bound < 1.5
        assert row.best.near.attained[row.case.regime].share == pytest.approx(0.9, abs=0.1)
    before = path.read_bytes()
    assert sweep(CASES, path, 1) == rows and path.read_bytes() == before
