"""tools/bench_overhead: its arithmetic, its errors, and a run on the real model;
bench_handover's too, on the same cluster."""

import json
import os
import shutil
import sys
import tempfile
import types
from pathlib import Path

import pytest

from tetri.bench.deployment import LOAD_S, SPLIT, own_folder, running
from tetri.bench.handover import __main__ as handover
from tetri.bench.overhead import __main__ as overhead
from tetri.bench.overhead import direct, live, measure
from tetri.bench.report import BenchError, progress
from tetri.config import load
from tetri.proc import launch

REPOSITORY = Path(__file__).parents[2]
EMULATED = REPOSITORY / "conf" / "emulated.toml"


def run_of(*arrivals):
    return {"arrivals": [list(times) for times in arrivals], "ids": [], "cpu": [1.0, 2.0]}


def test_the_rate_counts_whole_steps_of_all_requests_between_the_last_start_and_the_first_end():
    early = [0.1 * i for i in range(50)]
    late = [1.0 + 0.1 * i for i in range(60)]
    window = measure.steady(run_of(early, late))
    assert window["tok_s"] == pytest.approx(20)
    assert window["step_ms"]["median"] == pytest.approx(100)
    assert window["seconds"] == pytest.approx(4.9 - 1.1)
    assert window["cpu_step_ms"] == pytest.approx(1000 / window["steps"])


def test_requests_that_never_ran_together_make_no_window():
    with pytest.raises(BenchError, match="use more --tokens"):
        measure.steady(run_of([0.1, 0.2, 0.3], [1.1, 1.2, 1.3]))


def test_the_cpu_time_is_read_when_the_window_begins_and_when_it_ends():
    arrivals, clock = [[], []], iter(range(10))
    run = measure.Run(arrivals, 4, lambda: next(clock))
    for length in ((1, 0), (2, 1), (3, 2), (3, 3), (4, 3), (4, 4)):
        for times, count in zip(arrivals, length, strict=True):
            times += [0.0] * (count - len(times))
        run.look()
        assert len(run.cpu) == {(1, 0): 0, (2, 1): 0, (3, 2): 1, (3, 3): 1}.get(length, 2)


@pytest.fixture
def slow_prefill():
    """The live side of bench_overhead, its engines emulated: a chunk takes as long as fifty decode steps. And what it
    reports."""
    folder, lines = Path(tempfile.mkdtemp(prefix="tetri-", dir="/tmp")), []
    (folder / "cost.toml").write_text("prefill = [[1, 0.1]]\ndecode = [[1, 0.002]]\n")
    pair = "worker=[{iid='p0',role='prefill'},{iid='d0',role='decode'}]"
    own = [f"cluster.run_dir={folder}/run", f"cluster.name=b{os.getpid()}", f"engine.cost={folder}/cost.toml", pair]
    side = live.Live(load(EMULATED, own), lines.append)
    yield side, lines
    side.close()
    shutil.rmtree(folder)


def test_the_benchmark_asks_for_as_many_tokens_as_its_hand_overs_take(slow_prefill):
    side, lines = slow_prefill
    background, prompts = [[1] * 20, [2] * 20], [[3] * 30, [4] * 600]
    for _ in range(2):  # the second time it begins with what was enough
        found = side.busy_handovers(background, 8, 4000, prompts)
        assert [sample["prompt_tokens"] for sample in found] == [30, 600]
    assert lines.count("the background ended before the last hand-over: trying again with 16 tokens") == 1
    with pytest.raises(BenchError, match="even with the most tokens, 3"):
        side.busy_handovers(background, 8, 3, prompts)


def test_the_summary_has_the_medians():
    def fetched(direct_rate, live_rate, handover):
        window = {"step_ms": {"median": 10}, "cpu_step_ms": 8}
        sample = [{"prompt_tokens": 5, "ms": handover, "step_ms": 10}]
        sides = {"direct": {"tok_s": direct_rate, **window}, "live": {"tok_s": live_rate, **window}}
        return {**sides, "same_outputs": 1, "idle": sample, "busy": sample}

    found = measure.summary([fetched(100, 98, 20), fetched(100, 99, 25), fetched(200, 100, 60)])
    assert (found["ratio"], found["direct_tok_s"], found["live_tok_s"]) == (0.98, 100, 99)
    assert found["handover_ms"] == 25
    assert found["handover"]["idle"]["ms"]["worst"] == 60
    assert found["handover"]["busy"]["limit_ms"] == 30
    lines = overhead.shown(found).splitlines()
    assert lines[1].split() == ["round", "1", "100.0", "98.0", "0.980", "10.0", "10.0"]
    assert lines[4].startswith("median ratio 0.980")
    assert "idle: 25 ms (at most 60); two steps + 10 ms are 30" in lines[5]


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


@pytest.fixture(scope="module")
def real():
    """The real model's cluster for both benchmarks: for bench_handover its events are recorded."""
    with own_folder("bench") as folder:
        config = overhead.configure(SPLIT, ("cluster.record=true",), folder)
        with running(config, progress, LOAD_S):
            yield config


@pytest.fixture
def run(capsys, monkeypatch, real):
    """Run a benchmark in this process, on `real`: what it found."""
    cpus = os.sched_getaffinity(0)
    monkeypatch.setattr(overhead, "configure", lambda *_: real)
    monkeypatch.setattr(launch, "up", lambda config, *_: config.run_dir)
    monkeypatch.setattr(launch, "down", lambda _: None)
    monkeypatch.setattr(handover, "configured", lambda *_: real)

    def run_bench(main, *arguments):
        with pytest.raises(SystemExit):  # its status depends on this machine
            main(["--json", *arguments])
        return json.loads(capsys.readouterr().out)

    yield run_bench
    os.sched_setaffinity(0, cpus)


@pytest.mark.model
@pytest.mark.alone
@pytest.mark.timeout(600)
def test_the_real_models_hand_over_does_not_grow_with_the_prompt(run, tmp_path):
    found = run(handover.main, "--rounds", "2", "--plot", str(tmp_path / "way.png"))
    assert found["overlap"]["chunks"] == 14 and found["overlap"]["inside"] >= 12
    for state in ("idle", "busy"):
        assert found[state]["difference_ms"] < 2 * found[state]["limit_ms"]  # others may be at work on this machine
    assert (tmp_path / "way.png").stat().st_size > 10_000


@pytest.mark.model
@pytest.mark.alone
@pytest.mark.timeout(900)
def test_the_benchmark_runs_with_the_real_model(run):
    found = run(overhead.main, "--rounds", "1", "--tokens", "96", "--requests", "4")
    assert {"direct_tok_s", "live_tok_s", "ratio", "handover_ms"} <= found.keys()
    assert found["cpu_ratio"] > 0.8  # CPU time, for others may be at work on this machine
