"""The settings and what follows from them."""

import dataclasses
from pathlib import Path

import pytest

from tests.config.pair import PAIR
from tetri.config import Config, ConfigError, MonitorConfig, PolicyConfig, cpu_numbers, load
from tetri.policy.rules import Rules
from tetri.policy.views import FlipSettings


def test_addresses_follow_the_run_directory(write, tmp_path, monkeypatch):
    config = load(write(PAIR), [f"cluster.run_dir={tmp_path}"])
    for name in ("clients", "operators", "events", "loads", "views"):
        assert getattr(config, f"{name}_address") == f"ipc://{tmp_path}/{name}"
    assert config.inbox_address("p0") == f"ipc://{tmp_path}/inbox-p0"
    elsewhere = load(write(PAIR), [f"cluster.run_dir={tmp_path}", "broker.clients=tcp://127.0.0.1:5555"])
    assert elsewhere.clients_address == "tcp://127.0.0.1:5555"
    assert elsewhere.operators_address == f"ipc://{tmp_path}/operators"
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert Config().run_dir == Path("/run/user/7/tetri")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "~/run")
    with pytest.raises(ConfigError, match="XDG_RUNTIME_DIR is '~/run': set it to an absolute path"):
        assert Config().run_dir
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert str(Config().run_dir).startswith("/tmp/tetri-")
    with pytest.raises(ConfigError, match="known: p0, d0"):
        load(write(PAIR)).worker("zz")


def test_the_policies_settings_are_those_of_the_rules():
    assert dataclasses.asdict(PolicyConfig()) == dataclasses.asdict(Rules())
    shared = {f.name: getattr(MonitorConfig(), f.name) for f in dataclasses.fields(FlipSettings)}
    assert FlipSettings(**shared) == FlipSettings()


@pytest.mark.parametrize(("text", "cpus"), [("", set()), ("0", {0}), ("0-2", {0, 1, 2}), ("+0,2-3", {0, 2, 3})])
def test_cpu_numbers(text, cpus):
    assert cpu_numbers(text) == cpus
