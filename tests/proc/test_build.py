"""From the configuration to what cores are made of."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tetri.config import load
from tetri.cost import Cost
from tetri.engine.base import Leg
from tetri.proc import build
from tetri.proc.monitor import start_of
from tetri.request import Sampling

EMULATED = Path(__file__).parents[2] / "conf" / "emulated.toml"


def test_rules_and_flip_settings_are_those_of_the_configuration():
    config = load(EMULATED, ["policy.order=sjf", "policy.stretch=2", "monitor.hold_s=3", "monitor.floor=2"])
    assert dataclasses.asdict(build.rules(config)) == dataclasses.asdict(config.policy)
    settings = build.flip_settings(config)
    assert (settings.hold_s, settings.floor, settings.gain) == (3.0, 2, config.monitor.gain)


def test_the_engines_cost_is_its_timing_and_everybodys_prediction(tmp_path):
    table = tmp_path / "some.toml"
    table.write_text("prefill = [[1, 0.01], [512, 0.2]]\ndecode = [[1, 0.01], [32, 0.03]]\n")
    config = load(EMULATED, [f"engine.cost={table}"])
    assert build.predicted(config).prompt_s(512, 0, 512) == pytest.approx(0.2)
    slow = load(EMULATED, [f"engine.cost={table}", "emulated.time_scale=3"])
    assert build.predicted(slow).prompt_s(512, 0, 512) == pytest.approx(0.6)
    waited = []

    def wait(seconds: float) -> bool:
        waited.append(seconds)
        return False

    engine = build.engine(config, wait)
    engine.add(Leg("a", "prefill", tuple(range(100)), 100, Sampling()))
    engine.step()
    assert 0.01 < sum(waited) < 0.2


def test_without_a_table_longer_prompts_and_larger_batches_still_count_as_more():
    predicted = build.predicted(load(EMULATED))
    assert predicted != Cost()
    assert predicted.prompt_s(100, 0, 512) < predicted.prompt_s(600, 0, 512) < predicted.prompt_s(2000, 0, 512)
    assert predicted.decode_s(1, 0) < predicted.decode_s(9, 0)


def test_a_monitor_is_made_from_the_configuration():
    start = start_of(load(EMULATED, ["monitor.flip=idle", "monitor.load_ms=250", "monitor.stale_s=2"]))
    assert (start.flip, start.load_s, start.stale_s, start.gone_s) == ("idle", 0.25, 2.0, 20.0)
    assert start.core().load_s == 0.25
