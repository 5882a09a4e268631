"""How far off step times are predicted, while engines serve that take twice as long as their cost table says."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

import pytest
from click.testing import CliRunner
from live import EMULATED, LiveCluster
from traffic import Pressure

from tetri.bench.step_errors import PredictedStep, main, sections, shown, steps
from tetri.proc.replay import records

SLOWER = (
    "from tetri.engine.emulated import EmulatedEngine as E; "
    "E.__init__ = lambda self, i=E.__init__, **k: i(self, **{**k, 'time_scale': 2 * k['time_scale']})\n"
)
TABLE = "prefill = [[1, 0.02], [256, 0.06]]\ndecode = [[1, 0.02], [32, 0.04]]\n"  # so long that others matter little


def test_within_a_hundred_requests_steps_take_what_is_predicted(tmp_path: Path) -> None:
    (tmp_path / "table.toml").write_text(TABLE)
    overrides = [f"engine.cost={tmp_path}/table.toml", "cluster.record=true"]
    with LiveCluster(overrides=overrides, prologue=SLOWER) as cluster:
        pressure = Pressure(cluster, width=24, prompt=120, output=8)
        assert len(pressure.run(lambda: pressure.more(110))) >= 110
        notes = cluster.client().status()["notes"]
        assert any("as its cost table (engine.cost) predicts; predictions are corrected" in note for note in notes)
        cluster.stop()
        found = [step for path in records(cluster.folder) for step in steps(path)]
    for phase in ("prefill", "decode"):
        table = [step.table_s / step.seconds for step in found if step.phase == phase]
        corrected = [step.corrected_s / step.seconds for step in found if step.phase == phase and step.requests > 30]
        assert median(table) < 0.55 and 0.95 < median(corrected) < 1.05, (phase, median(table), median(corrected))


def test_errors_are_counted_by_phase_and_by_how_many_requests_came_before():
    made = sections(
        [
            PredictedStep("decode", 5, 0.1, 0.05, 0.11),
            PredictedStep("decode", 20, 0.1, 0.05, 0.09),
            PredictedStep("mixed", 21, 0.2, 0.1, 0.2),
            PredictedStep("decode", 101, 0.1, 0.05, 0.1),
        ]
    )
    assert [*made] == ["decode, after 0 requests", "mixed, after 20 requests", "decode, after 100 requests"]
    assert made["decode, after 0 requests"]["table"] == pytest.approx({"mean": 0.5, "p95": 0.5, "sum": -0.5})
    assert made["decode, after 0 requests"]["corrected"] == pytest.approx({"mean": 0.1, "p95": 0.1, "sum": 0.0})
    assert shown(made).splitlines()[2].split()[4:] == ["1", "50.0%", "50.0%", "-50.0%", "0.0%", "0.0%", "0.0%"]


def test_the_tool_serves_and_compares(tmp_path: Path) -> None:
    (tmp_path / "table.toml").write_text("prefill = [[1, 0.002], [512, 0.01]]\ndecode = [[1, 0.002]]\n")
    settings = ["--set", f"engine.cost={tmp_path}/table.toml", "--set", "emulated.time_scale=1"]
    done = CliRunner().invoke(main, ["--conf", str(EMULATED), *settings, "--requests", "9", "--rate", "50", "--json"])
    assert done.exit_code == 0, done.output
    made = json.loads(done.output.splitlines()[-1])
    assert made["requests"] == 9 and made["errors"]["decode, after 0 requests"]["steps"] > 20
