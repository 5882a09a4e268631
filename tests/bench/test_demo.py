"""bin/demo: what it holds against an answer, its errors, and runs of it.
With the real model: tests/engine/vllm/test_live.py."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from tetri.bench import demo
from tetri.client import Result
from tetri.request import Receipt, Usage

REPOSITORY = Path(__file__).parents[2]
EMULATED = REPOSITORY / "conf" / "emulated.toml"
MARK = f"TETRI_TEST_{os.getpid()}"


def result(**receipt):
    facts = {"prompt_tokens": 9, "adopted": 9, "chunks": 1, "kv_bytes": 1 << 20, **receipt}
    timeline = {"queued": 0.001, "prefill": 0.1, "decode": 0.5}
    usage = Usage(prompt_tokens=9, completion_tokens=2)
    return Result("r1", "a b", [1, 2], "length", usage, timeline, 0.1, 0.6, Receipt(**facts))


def test_the_demo_fails_when_prompt_tokens_were_computed_again():
    assert demo.problems(result(), 1) == []
    assert "8 of 9 prompt tokens were adopted" in demo.problems(result(adopted=8), 1)[0]
    assert "3 prompt tokens were computed again" in demo.problems(result(recomputed=3), 1)[0]
    assert demo.problems(result(chunks=2), 2) == []
    assert demo.problems(result(adopted=0, local=9, chunks=0), 2) == []  # it stayed where it was prefilled
    assert "came in 1 chunks" in demo.problems(result(chunks=1), 2)[0]


def start_demo(*arguments):
    command = [sys.executable, "-m", "tetri.bench.demo", *arguments]
    environment = {**os.environ, MARK: "1"}  # inherited by all that it starts
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def left_of(process):
    """Segments and processes of this demo that are still there."""
    found = [name for name in os.listdir("/dev/shm") if f"demo-{process.pid}-" in name]
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            if MARK.encode() in Path("/proc", entry, "environ").read_bytes():
                found.append(entry)
        except OSError:
            pass  # it ended, or is another user's
    return found


def test_the_demo_answers_two_prompts_and_shows_where_the_time_went():
    process = start_demo("--conf", EMULATED)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    for word in ("short", "long", "TTFT", "JCT", "KV bytes moved", "local", "adopted", "recomputed", "prefill on"):
        assert word in output
    assert left_of(process) == []


def test_an_interrupted_demo_leaves_nothing(tmp_path):
    slow = tmp_path / "slow.toml"
    cost = REPOSITORY / "conf" / "cost" / "cpu-smollm2.toml"
    slow.write_text(EMULATED.read_text().replace("[engine]", f'[engine]\ncost = "{cost}"'))
    process = start_demo("--conf", slow)
    while "blue." not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGHUP)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "everything is stopped" in errors
    assert left_of(process) == []


def test_a_wrong_configuration_is_one_line(tmp_path):
    wrong = tmp_path / "wrong.toml"
    wrong.write_text("[engine]\nkinds = 1\n")
    process = start_demo("--conf", wrong)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and output == ""
    assert errors.startswith("bin/demo: ") and "engine.kinds" in errors and errors.count("\n") == 1
