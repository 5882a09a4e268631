"""Whether the configured deployment fits the limit of open files."""

import logging
from contextlib import closing
from pathlib import Path

from tetri.config import load
from tetri.net import descriptors
from tetri.proc import build, open_files

EMULATED = Path(__file__).parents[2] / "conf" / "emulated.toml"


def test_what_is_configured_is_compared_with_the_limit():
    config = load(EMULATED, ["broker.max_clients=1000"])
    for name in ("broker", "gateway", "monitor", "p0"):
        wanted = open_files.needed(config, name)
        assert open_files.shortage(config, name, wanted) is None
        assert f"{name} may need {wanted} open files" in open_files.shortage(config, name, wanted - 1)
    assert "1000 clients (broker.max_clients)" in open_files.shortage(config, "broker", 256)
    assert "4000 connections (gateway.max_connections)" in open_files.shortage(config, "gateway", 256)


def test_a_process_that_needs_more_says_so_at_its_start(caplog, monkeypatch):
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(descriptors, "raise_limit", lambda: 256)
    with closing(build.open_hub(load(EMULATED), "broker", logging.getLogger("broker"))):
        assert "the hard limit is 256: raise it" in caplog.text


def test_a_link_takes_no_more_descriptors_than_planned(tmp_path):
    hub, before = build.open_hub(load(EMULATED), "p0", logging.getLogger("p0")), 0
    with closing(hub):
        before = descriptors.used()
        for number in range(8):
            hub.connect(f"p{number}", f"ipc:///tmp/nobody-{number}")
        assert descriptors.used() - before <= 8 * open_files.LINK
