"""tetri-cli profile, on an emulated engine that really waits, and once on vLLM."""

import errno
import json
import signal
import subprocess
import sys
from functools import partial

import pytest
from live import EMULATED

from tests.cli.fakes import start
from tetri import atomic, cost

KNOWN = """
prefill = [[1, 0.2], [8, 0.24], [16, 0.32], [32, 0.64]]
decode = [[1, 0.2], [4, 0.4]]
prefill_start_s = 1e-3
decode_context_s = 1e-3
"""


@pytest.fixture
def arguments(tmp_path):
    """Of a small engine that takes little time."""
    (tmp_path / "known.toml").write_text(KNOWN)
    settings = {
        "engine.cost": tmp_path / "known.toml",
        "engine.chunk_tokens": 32,
        "engine.max_batch": 4,
        "emulated.context": 130,
        "emulated.blocks": 64,
        "emulated.time_scale": 0.02,
    }
    overrides = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    return ["profile", "--conf", EMULATED, *overrides]


@pytest.fixture
def run(run, arguments):
    return partial(run, *arguments)


def test_a_table_is_shown_and_written(run, tmp_path):
    path = tmp_path / "new.toml"
    status, out, err = run("--quick", "--rounds", "2", "--out", str(path))
    assert status == 0
    assert "the knee" in out and "chunk_tokens  " in out and "fitted: " in out and "held out: " in out
    assert err.splitlines() == [
        "starting the emulated engine",
        *("round 1 of 2 measured", "round 2 of 2 measured"),
        f"written to {path}",
    ]
    made = cost.load(path)
    assert made.kv_token_bytes == 64 and made.kv_tokens == 64 * 16
    assert made.source.startswith("emulated 1, rolling-hash u8, ") and made.source.endswith(", 2 rounds")
    # It is a clock's time, on a machine that may have other work: tests/profile is exact.
    assert [x for x, _ in made.prefill] == [1, 4, 16, 32] and [x for x, _ in made.decode] == [1, 4]
    assert 0.99 * 0.64 * 0.02 < dict(made.prefill)[32] < 10 and made.chunk_tokens in (4, 16, 32)
    head = path.read_text().splitlines()
    assert head[0].startswith("# Made by: tetri-cli profile --set ") and f"--rounds 2 --out {path}" in head[0]
    assert any(line.startswith("# held out: ") for line in head)
    assert [other.name for other in tmp_path.iterdir() if other.name.startswith(".")] == []


def test_json_is_one_object_with_every_point(run):
    status, out, _ = run("--quick", "--rounds", "1", "--json")
    found = json.loads(out)
    assert (status, out.count("\n")) == (0, 1)
    assert list(found) == ["cost", "quality", "spread", "notes", "points", "run"]
    assert len(found["cost"]["prefill"]) == 4 and found["run"]["core_share"] is None
    assert {point["kind"] for point in found["points"]} == {"prefill", "decode", "packed", "mixed"}
    assert all(point["seconds"] > 0 and point["predicted_s"] > 0 for point in found["points"])


def test_a_table_is_kept_for_workers_and_listed(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TETRI_CACHE", str(tmp_path / "cache"))
    assert run("--kept") == (0, "no table is kept\n", "")
    status, _, err = run("--quick", "--rounds", "1", "--keep")
    (path,) = (tmp_path / "cache" / "cost").glob("*.toml")
    assert status == 0 and err.splitlines()[-1] == f"kept as {path}"
    made = cost.load(path)
    assert run("--kept") == (0, f"{path}  {made.source}\n", "")
    status, out, _ = run("--kept", "--json")
    assert json.loads(out)[str(path)]["chunk_tokens"] == made.chunk_tokens


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--rounds", "0"], "--rounds"),
        (["--out", "/no/such/folder/x.toml"], "--out: there is no folder /no/such/folder"),
        (["--out", "/"], "is a directory"),
        (["--out", "/proc/x.toml"], "--out: /proc/x.toml cannot be written: "),
        (["--set", "engine.cost="], "give it a cost table"),
        (["--set", "engine.teapot=1"], "unknown key"),
        (["--cpus", "9999"], "cpus = '9999': this process may use CPU"),
        (["--cpu-time"], "--cpu-time is for vLLM on one core"),
        (["--cpus", "zero"], "CPU numbers such as"),
        (["--conf", "/no/such.toml"], "/no/such.toml"),
        (["--set", "emulated.blocks=1"], "blocks"),
    ],
)
def test_what_is_wrong_is_one_line(run, more, says):
    status, out, err = run("--quick", "--rounds", "1", *more)
    assert (status, out) == (2, "")
    assert says in err.splitlines()[-1] and err.splitlines()[-1].startswith("tetri-cli: ")


def test_the_table_is_shown_although_its_file_cannot_be_written(run, tmp_path, monkeypatch):
    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(atomic, "write_text", full)
    status, out, err = run("--quick", "--rounds", "1", "--out", str(tmp_path / "new.toml"))
    assert status == 1 and "chunk_tokens  " in out
    assert err.splitlines()[-1] == f"tetri-cli: {tmp_path}/new.toml: No space left on device"


def test_an_interrupt_leaves_nothing(arguments, tmp_path):
    process = start(*arguments, "--rounds", "10000", "--quick", "--out", tmp_path / "new.toml", bufsize=-1, text=True)
    lines = [process.stderr.readline() for _ in range(2)]
    assert lines[1] == "round 1 of 10000 measured\n", lines
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=30)
    assert process.returncode == 130 and rest.splitlines()[-1] == "tetri-cli: interrupted"
    assert [other.name for other in tmp_path.iterdir()] == ["known.toml"]


@pytest.mark.model
@pytest.mark.alone
@pytest.mark.timeout(900)
def test_vllm_is_measured(tmp_path):
    path = tmp_path / "cpu.toml"
    small = ["--set", "engine.chunk_tokens=256", "--set", "engine.max_batch=8", "--set", "engine.kv_mib=256"]
    small += ["--quick", "--rounds", "2", "--cpus", "+0", "--cpu-time", "--out", str(path)]
    command = [sys.executable, "-c", "from tetri.cli import main; main()", "profile"]
    done = subprocess.run([*command, *small], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = cost.load(path)
    assert made.source.startswith("vLLM 0.") and "smollm2-135m bfloat16, 1 core of " in made.source
    assert [x for x, _ in made.prefill] == [1, 4, 16, 64, 128, 256] and [x for x, _ in made.decode] == [1, 4, 8]
    assert made.chunk_tokens >= 64 and made.kv_token_bytes == 23040 and made.kv_tokens > 8192
    assert 1.5 < made.prompt_s(256, 0, 256) / made.prompt_s(64, 0, 256) < 6, "a chunk four times as long"
    assert made.prefill_start_s > 0 and made.decode_context_s > 0
    assert "W1" not in done.stdout and "WARNING" not in done.stdout, "vLLM's log is not the result"
