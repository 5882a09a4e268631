"""bin/demo and tools/bench_overhead: their arithmetic, their errors, and runs of both."""

import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

from tetri.client import Result
from tetri.request import Receipt, Usage

REPOSITORY = Path(__file__).parent.parent
EMULATED = REPOSITORY / "conf" / "emulated.toml"
MARK = f"TETRI_TEST_{os.getpid()}"
for folder in ("tools", "tools/overhead"):  # behind this folder's own modules
    sys.path.append(str(REPOSITORY / folder))

import demo  # noqa: E402
import direct  # noqa: E402
import measure  # noqa: E402


def run_of(*arrivals):
    return {"arrivals": [list(times) for times in arrivals], "ids": [], "cpu": [1.0, 2.0]}


def test_the_rate_counts_whole_steps_of_all_requests_between_the_last_start_and_the_first_end():
    early = [0.1 * i for i in range(50)]
    late = [1.0 + 0.1 * i for i in range(60)]
    window = measure.steady(run_of(early, late))
    assert window["tok_s"] == pytest.approx(20)
    assert window["step_ms"] == pytest.approx(100)
    assert window["seconds"] == pytest.approx(4.9 - 1.1)
    assert window["cpu_step_ms"] == pytest.approx(1000 / window["steps"])


def test_requests_that_never_ran_together_make_no_window():
    with pytest.raises(measure.BenchError, match="ask for more tokens"):
        measure.steady(run_of([0.1, 0.2, 0.3], [1.1, 1.2, 1.3]))


def test_the_cpu_time_is_read_when_the_window_begins_and_when_it_ends():
    arrivals, clock = [[], []], iter(range(10))
    run = measure.Run(arrivals, 4, lambda: next(clock))
    for length in ((1, 0), (2, 1), (3, 2), (3, 3), (4, 3), (4, 4)):
        for times, count in zip(arrivals, length, strict=True):
            times += [0.0] * (count - len(times))
        run.look()
        assert len(run.cpu) == {(1, 0): 0, (2, 1): 0, (3, 2): 1, (3, 3): 1}.get(length, 2)


def test_the_summary_has_the_medians():
    def taken(direct_rate, live_rate, handover):
        window = {"step_ms": 10, "cpu_step_ms": 8}
        sample = [{"prompt_tokens": 5, "ms": handover, "step_ms": 10}]
        sides = {"direct": {"tok_s": direct_rate, **window}, "live": {"tok_s": live_rate, **window}}
        return {**sides, "same_outputs": 1, "idle": sample, "busy": sample}

    found = measure.summary([taken(100, 98, 20), taken(100, 99, 25), taken(200, 100, 60)])
    assert (found["ratio"], found["direct_tok_s"], found["live_tok_s"]) == (0.98, 100, 99)
    assert found["handover_ms"] == 25
    assert found["handover"]["idle"]["max_ms"] == 60
    assert found["handover"]["busy"]["limit_ms"] == 30


def test_plain_vllm_is_told_what_the_live_engine_is_told(monkeypatch):
    from tetri.engine.vllm.setup import VllmSettings, engine_config

    told = {}

    class Arguments:
        def __init__(self, **arguments):
            told.update(arguments)

        def create_engine_config(self):
            raise InterruptedError

    cpu = types.SimpleNamespace(is_cpu=lambda: True, is_cuda=lambda: False, device_type="cpu")
    stand_in = {"EngineArgs": Arguments, "KVTransferConfig": dict, "current_platform": cpu}
    for name in ("vllm", "vllm.config", "vllm.engine", "vllm.engine.arg_utils", "vllm.platforms"):
        module = types.ModuleType(name)
        vars(module).update(stand_in)
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(InterruptedError):
        engine_config(VllmSettings(Path("/m"), "bfloat16", 512, 32, 1 << 30, None, "w", 128))
    for name in ("kv_transfer_config", "logits_processors", "scheduler_cls"):
        del told[name]
    assert direct.engine_arguments("/m", "bfloat16", 0, 512, 32, 128, 1 << 30) == told


def test_the_benchmark_wants_the_real_engine():
    command = [REPOSITORY / "tools" / "bench_overhead", "--conf", EMULATED]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("bench_overhead: only the real engine") and done.stderr.count("\n") == 1


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
    assert "came in 1 chunks" in demo.problems(result(chunks=1), 2)[0]


def test_the_demo_puts_both_workers_on_the_only_cpu_and_says_so(tmp_path, capsys):
    config = demo.configure(REPOSITORY / "conf" / "default.toml", tmp_path, [3])
    assert {worker.cpus for worker in config.workers} == {"3"} and config.broker.cpus == "3"
    assert "one CPU only" in capsys.readouterr().err
    config = demo.configure(REPOSITORY / "conf" / "default.toml", tmp_path, [2, 5])
    assert [(worker.role, worker.cpus) for worker in config.workers] == [("prefill", "2"), ("decode", "5")]


def start_demo(*arguments):
    command = [sys.executable, REPOSITORY / "tools" / "demo.py", *arguments]
    environment = {**os.environ, MARK: "1"}  # inherited by all that it starts
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def left_of(process):
    """Segments and processes of this demo that are still there."""
    found = [name for name in os.listdir("/dev/shm") if f"demo{process.pid}-" in name]
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
    for word in ("short", "long", "TTFT", "JCT", "KV bytes moved", "adopted", "recomputed", "prefill on"):
        assert word in output
    assert left_of(process) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_demo_leaves_nothing(number, tmp_path):
    slow = tmp_path / "slow.toml"
    cost = REPOSITORY / "conf" / "cost" / "cpu-smollm2.toml"
    slow.write_text(EMULATED.read_text().replace("[engine]", f'[engine]\ncost = "{cost}"'))
    process = start_demo("--conf", slow)
    while "blue." not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()
    process.send_signal(number)
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


@pytest.mark.model
@pytest.mark.timeout(900)
def test_the_demo_runs_with_the_real_model():
    done = subprocess.run([REPOSITORY / "bin" / "demo"], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    chunks = next(line for line in done.stdout.splitlines() if "chunks" in line)
    assert int(chunks.split("│")[3]) >= 2


@pytest.mark.model
@pytest.mark.alone
@pytest.mark.timeout(900)
def test_the_benchmark_runs_with_the_real_model():
    command = [REPOSITORY / "tools" / "bench_overhead", "--json", "--rounds", "1", "--tokens", "96"]
    done = subprocess.run([*command, "--requests", "4"], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {"direct_tok_s", "live_tok_s", "ratio", "handover_ms"} <= found.keys()
    assert found["cpu_ratio"] > 0.8  # CPU time, for others may be at work on this machine
