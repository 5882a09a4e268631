"""tools/bench_watching: the situations, what it makes of the measured phases, and a small run of the real processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from tetri.bench import watching
from tetri.bench.report import BenchError


def shares(tokens, gateway=0.0):
    """Of a broker that relays so many tokens per second of its processor time, at 1,000 a second, and of a gateway."""
    return {"broker": 1000 / tokens, "gateway": gateway}


def test_medians_and_limits():
    quiet = {"alone": shares(10_000), "idle": shares(10_000, 0.005)}
    quiet |= {"page": shares(9900, 0.012), "scrape": shares(9900, 0.011)}
    rounds = [{**quiet, "both": shares(both, 0.02)} for both in (9000, 9800, 9900)]
    found = watching.figures(rounds, 1000, 0.0004)
    assert found == {
        "rounds": 3,
        "broker_tok_cpu_s": {"alone": 10_000, "idle": 10_000, "page": 9900, "scrape": 9900, "both": 9800},
        "gateway_percent": {"alone": 0.0, "idle": 0.5, "page": 1.2, "scrape": 1.1, "both": 2.0},
        "observation_ms": 0.4,
        "ratio": {"medians": 0.98, "low": 0.9, "high": 0.99},
        "ok": True,
    }
    assert watching.shown(found).splitlines()[-1] == "within the limits: yes"
    for bad in ({"both": shares(9600)}, {"page": shares(9900, 0.03)}, {"scrape": shares(9900, 0.03)}):
        assert not watching.figures([{**rounds[1], **bad}], 1000, 0.0004)["ok"]
    assert not watching.figures(rounds, 1000, 0.001)["ok"]


def state(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_without_a_gateway_it_is_stopped_meanwhile():
    sleeping = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    try:
        with watching.looking(SimpleNamespace(pids={"gateway": sleeping.pid}, url=""), "alone"):
            os.waitid(os.P_PID, sleeping.pid, os.WSTOPPED)
            assert state(sleeping.pid) == "T"
        os.waitid(os.P_PID, sleeping.pid, os.WCONTINUED)
    finally:
        sleeping.communicate(b"\n")


def test_a_gateway_that_tells_too_little_is_an_error(monkeypatch):
    def deaf(url, stop):
        stop.wait()
        return -1

    monkeypatch.setitem(watching.LOOKS, "page", (deaf,))
    with (
        pytest.raises(BenchError, match="deaf: -1 answers in"),
        watching.looking(SimpleNamespace(pids={"gateway": os.getpid()}, url=""), "page"),
    ):
        pass


def test_the_real_processes(monkeypatch):
    monkeypatch.setattr(watching, "SETTLE_S", 0.1)
    monkeypatch.setattr(watching, "SPARE", 6.0)  # for a slow machine
    small = ["--json", "--instances", "3", "--streams", "6", "--rate", "300", "--seconds", "0.2", "--rounds", "1"]
    result = CliRunner().invoke(watching.main, small)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["instances"], found["streams"], found["rounds"]) == (3, 6, 1)
    assert all(value > 0 for value in found["broker_tok_cpu_s"].values())
    assert found["observation_ms"] > 0
    assert found["gateway_percent"]["alone"] == 0 < found["gateway_percent"]["page"]
