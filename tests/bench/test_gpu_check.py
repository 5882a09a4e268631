"""tools/gpu_check: its line where there is no GPU, its table, its exit status, and a run on the stand-in."""

import json
import subprocess
from pathlib import Path

import pytest

from tetri.bench import gpu_check

REPOSITORY = Path(__file__).parents[2]
# What takes long: on the stand-in the run is to show that the check works, not that the path does.
LEFT_OUT = [
    "tests/kv/cuda/test_gpu.py::TestGpus",
    "tests/kv/cuda/test_gpu.py::test_bandwidth[two GPUs",
    "tests/kv/cuda/test_gpu.py::test_bandwidth[one GPU-48",
    "tests/proc/test_live_cuda.py",
]


def run(*arguments, **environment):
    command = [str(REPOSITORY / "tools" / "gpu_check"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, **environment)


@pytest.fixture
def no_gpu():
    try:
        gpu_check.load()
    except gpu_check.KVError as error:
        return str(error)
    pytest.skip("this machine has a GPU")


def test_without_a_gpu_one_line_says_what_is_missing(no_gpu):
    done = run()
    assert (done.returncode, done.stdout) == (1, f"gpu_check: {no_gpu}\n")
    assert "pip install" in no_gpu or "nvidia-smi" in no_gpu


def test_without_a_gpu_json_says_it_too(no_gpu):
    done = run("--json")
    assert done.returncode == 1
    assert json.loads(done.stdout) == {"problem": no_gpu, "rows": [], "tests": {}, "ok": False}


def test_a_run_on_the_stand_in(tmp_path):
    done = run("--json", "--stand-in", str(tmp_path), *(f"--deselect={test}" for test in LEFT_OUT))
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert {(row["chunk_mb"], row["digest"]) for row in told["rows"]} == {
        (mb, digest) for mb in (1.0, 4.2, 12.6) for digest in (True, False)
    }
    assert all(row["equal"] and row["gbps"] > 0 and row["copy_gbps"] > 0 for row in told["rows"])
    assert sum(test["outcome"] == "passed" for test in told["tests"].values()) == 7


def test_the_table_has_a_line_for_each_row():
    timed = {"chunk_mb": 12.6, "digest": True, "take_ms": 1.234, "gbps": 10.2, "copy_gbps": 500.0, "equal": True}
    rows = [{"check": "one GPU", "device": "H100", **timed}, {"check": "vLLM", "device": "H100", "equal": False}]
    head, first, second = gpu_check.shown(rows).splitlines()
    assert " ".join(first.split()) == "one GPU H100 12.6 MB on 1.23 ms 10.2 GB/s 500.0 GB/s yes"
    assert second.split() == ["vLLM", "H100", "NO"] and head.index("equal") == second.index("NO")


def test_failures_are_named_and_skips_have_their_reason(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="a" name="x"/>'
        '<testcase classname="a" name="y"><failure message="assert 1 == 2&#10;more"/></testcase>'
        '<testcase classname="a" name="z"><error message="setup"/></testcase>'
        '<testcase classname="a" name="s"><skipped message="one GPU"/></testcase></testsuite></testsuites>'
    )
    assert gpu_check.summary(gpu_check.outcomes(report)) == [
        "1 passed, 2 failed, 1 skipped",
        "failed: a.y: assert 1 == 2",
        "failed: a.z: setup",
        "skipped 1: one GPU",
    ]
