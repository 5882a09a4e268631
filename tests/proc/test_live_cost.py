"""Engines that take twice as long as their cost table says: predictions are corrected while they serve."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from live import LiveCluster
from traffic import Pressure

from tetri.bench.step_errors import steps
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
