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
from tetri.bench.relay.__main__ import Phase
from tetri.bench.report import BenchError


def phase(tokens, gateway=0.0):
    """So many tokens in a second of the broker's processor time, and the gateway's share of a core."""
    return Phase([0.001] * tokens, 1.0, tokens, {"broker": 0.1, "gateway": gateway})


def test_medians_and_limits():
    quiet = {"alone": phase(100), "idle": phase(100, 0.005), "page": phase(99, 0.012), "scrape": phase(99, 0.011)}
    rounds = [{**quiet, "both": phase(both, 0.02)} for both in (90, 98, 99)]
    found = watching.figures(rounds, 0.0004)
    assert found == {
        "rounds": 3,
        "broker_tok_cpu_s": {"alone": 100, "idle": 100, "page": 99, "scrape": 99, "both": 98},
        "gateway_percent": {"alone": 0.0, "idle": 0.5, "page": 1.2, "scrape": 1.1, "both": 2.0},
        "observation_ms": 0.4,
        "ratio": {"median": 0.98, "low": 0.9, "high": 0.99},
        "ok": True,
    }
    assert watching.shown(found).splitlines()[-1] == "within the limits: yes"
    for bad in ({"both": phase(96)}, {"page": phase(99, 0.03)}, {"scrape": phase(99, 0.03)}):
        assert not watching.figures([{**rounds[1], **bad}], 0.0004)["ok"]
    assert not watching.figures(rounds, 0.001)["ok"]


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


def test_the_real_processes():
    small = ["--json", "--instances", "3", "--streams", "6", "--rate", "300", "--seconds", "0.3", "--rounds", "1"]
    result = CliRunner().invoke(watching.main, small)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["instances"], found["streams"], found["rounds"]) == (3, 6, 1)
    assert all(value > 0 for value in found["broker_tok_cpu_s"].values())
    assert found["observation_ms"] > 0
    assert found["gateway_percent"]["alone"] == 0 < found["gateway_percent"]["page"]
