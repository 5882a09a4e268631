"""tools/torture: its arguments, its report, and some of its cases. The whole of it takes minutes."""

import json
import signal
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from live import wait_until

from tetri.bench.deployment import segments
from tetri.bench.report import BenchError
from tetri.bench.torture import __main__ as program
from tetri.bench.torture import membership, mixed
from tetri.bench.torture.case import ADDED_GAP_MS, Case, Findings, judged
from tetri.bench.torture.deployed import deployed, workers
from tetri.bench.torture.listener import Gaps, Listener, gaps_s
from tetri.bench.torture.load import Load
from tetri.bench.torture.records import sent
from tetri.config import load
from tetri.proc import launch
from tetri.proc.supervise import Supervisor
from tetri.wire.messages import Assign

TORTURE = Path(__file__).parents[2] / "tools" / "torture"
HARDEST = (
    *("descriptors", "texts", "stopped-reader", "client-cost", "assigns", "membership", "mixed", "poison"),
    *("unreadable", "cut-path", "unlinked", "frozen"),
)


# ---------------------------------------------------------------- cases


def test_256_workers_learn_of_each_other():
    found = Findings()
    membership.membership(Path(), found)
    assert found.broken == [] and found.figures["start_messages"] >= membership.WORKERS


def test_a_token_of_another_instance_is_not_the_requests():
    assert mixed.interleaved() == mixed.WRITTEN


def test_a_deployment_a_listener_and_a_load_and_nothing_is_left_of_them():

    def run(folder, found):
        settings = [workers(1, 1), "cluster.record=true"]
        with deployed(folder, found, settings) as cluster, Listener(cluster.config, 2) as listener:
            gaps = Gaps(listener, found, lambda: listener.wait_for_tokens(2))
            with Load(cluster.config, 2, 6, longest=20, tokens=5) as requests:
                requests.wait(6)
            requests.judge(found)
            listener.wait_for_tokens(2)
            gaps.judge()
            assert requests.places() == {"d0": 6} and cluster.counter("accepted") == 8
            assert cluster.instance("d0")["role"] == "decode" and cluster.pid("d0") > 0 and cluster.log("d0")
            with pytest.raises(BenchError, match="does not know d1"):
                cluster.instance("d1")
        assert sum(isinstance(message, Assign) for _, message in sent(folder, "broker", "p0")) == 8
        assert segments(cluster.config) == []

    verdict = judged(Case("made", "", run))
    figures = verdict["figures"]
    assert (figures["answers"], figures["errors"], figures["wrong"], figures["left_over"]) == (6, {}, [], [])
    assert (figures["streams_wrong"], figures["streams_lost"], figures["crashes"]) == (0, 0, 0)
    assert [line for line in verdict["broken"] if "worst_gap_ms" not in line] == []  # the machine may be busy
    limit = figures["base_gap_ms"]["worst"] + ADDED_GAP_MS
    assert verdict["limits"]["worst_gap_ms"] == f"at most {limit:g}"


def test_ctrl_c_leaves_nothing():
    with subprocess.Popen([TORTURE, "--case", "frozen"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        folder = wait_for_folder(process)
        wait_until(lambda: (folder / launch.STATE).exists() or process.poll() is not None, "it is not up", 60.0)
        config = load(folder / launch.CONF)
        assert len(segments(config)) == 2
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 1
    assert not folder.exists() and segments(config) == [] and Supervisor(folder).alive() == []


def wait_for_folder(process):
    """The run directory of the case that begins."""
    pattern = f"tetri-torture-{process.pid}-*"
    wait_until(lambda: any(Path("/tmp").glob(pattern)) or process.poll() is not None, "it does not begin", 60.0)
    (folder,) = Path("/tmp").glob(pattern)
    return folder


# ---------------------------------------------------------------- arithmetic


def test_gaps_are_those_that_end_in_the_time_and_the_silence_at_its_end():
    times = [1.0, 2.0, 4.0, 4.5]
    assert gaps_s(times, 2.5, 5.0) == [2.0, 0.5, 0.5]
    assert gaps_s(times, 2.5, 4.2) == [2.0, pytest.approx(0.2)]
    assert gaps_s(times, 5.0, 9.0) == [4.0]
    assert gaps_s([], 5.0, 9.0) == [4.0]


def test_a_limit_that_is_not_kept_is_a_line():
    found = Findings()
    found.note("a", 1)
    found.at_most("b", 2, 2)
    found.at_least("c", 2, 2)
    found.exactly("d", [], [])
    assert found.broken == []
    found.at_most("b", 3, 2)
    found.at_least("c", 1, 2)
    found.exactly("d", ["x"], [])
    assert found.broken == ["b is 3, at most 2", "c is 1, at least 2", "d is ['x'], must be []"]
    assert found.figures == {"a": 1, "b": 3, "c": 1, "d": ["x"]}
    assert found.limits == {"b": "at most 2", "c": "at least 2", "d": "must be []"}


# ---------------------------------------------------------------- the program


def good(folder, found):
    found.at_most("gap_ms", 1.5, 2)
    found.note("spread_ms", {"median": 1.25, "worst": 2})
    found.exactly("wrong", [], [])


def bad(folder, found):
    found.at_most("gap_ms", 3, 2)
    raise BenchError("nobody answers")


def broken(folder, found):
    raise KeyError("a")


@pytest.fixture
def cases(monkeypatch):
    cases = [Case("good", "a fault", good), Case("bad", "another", bad), Case("broken", "a third", broken)]
    monkeypatch.setattr(program, "CASES", cases)
    monkeypatch.setattr(program, "NAMES", [case.name for case in cases])


def test_a_case_that_fails_spoils_no_other(cases):
    ran = CliRunner().invoke(program.main, ["--json"])
    found = json.loads(ran.stdout)
    assert ran.exit_code == 1 and not found["ok"]
    first, second, third = found["cases"]
    assert (first["name"], first["ok"], second["ok"], third["ok"]) == ("good", True, False, False)
    assert first["figures"].pop("seconds") >= 0
    assert first["figures"] == {"gap_ms": 1.5, "spread_ms": {"median": 1.25, "worst": 2}, "wrong": []}
    assert second["broken"] == ["gap_ms is 3, at most 2", "it could not go on: nobody answers"]
    assert third["broken"] == ["it failed: KeyError('a')"] and "Traceback" in ran.stderr


def test_the_report_is_a_table(cases):
    lines = CliRunner().invoke(program.main).stdout.splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["case", "figure", "value", "limit"],
        ["good", "ok", "gap_ms", "1.5", "at", "most", "2"],
        ["spread_ms", "median", "1.25,", "worst", "2"],
    ]
    assert lines[3].split() == ["wrong", "none", "must", "be", "[]"]
    assert "bad: it could not go on: nobody answers" in lines and lines[-1] == "1 of 3 cases are ok"


def test_all_cases_or_those_that_are_named(monkeypatch):
    asked = []
    monkeypatch.setattr(program, "measured", lambda names: asked.append([*names]) or {"cases": [], "ok": True})
    assert CliRunner().invoke(program.main, ["--json"]).exit_code == 0
    assert CliRunner().invoke(program.main, ["--json", "--case", "frozen", "--case", "texts"]).exit_code == 0
    assert asked == [[*HARDEST], ["frozen", "texts"]]
    unknown = CliRunner().invoke(program.main, ["--case", "nonsense"])
    assert unknown.exit_code == 2 and "cut-path" in unknown.stderr


def test_the_cases_can_be_listed():
    ran = CliRunner().invoke(program.main, ["--list", "--json"])
    assert [case["name"] for case in json.loads(ran.stdout)["cases"]] == [*HARDEST]
    lines = CliRunner().invoke(program.main, ["--list"]).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["case", *HARDEST]
