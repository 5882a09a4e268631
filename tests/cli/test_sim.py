"""tetri-cli sim run: what it prints, the same for the same arguments, and one line for every wrong one."""

import errno
import json
import os
from dataclasses import fields
from functools import partial

import pytest

from tests.cli.fakes import start
from tetri.bench import plots
from tetri.sim.faulty.chance import Faults

HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
SMALL = ("--requests", "30", "--rate", "5", "--prompt-tokens", "1-600", "--output-tokens", "lognormal:60:0.5")
FAULTS = "drop=0.02,duplicate=0.02,kill=0.02,freeze=0.02,disconnect=0.01,until=20"


@pytest.fixture
def run(run):
    """`tetri-cli sim run`: (exit status, stdout, stderr)."""
    return partial(run, "sim", "run")


def test_json_is_one_object_with_what_was_promised(run):
    status, out, err = run(*SMALL, "--prefill", 2, "--decode", 2, "--json")
    made = json.loads(out)
    assert (status, err) == (0, "")
    assert (made["requests"], made["failed"], made["refused"]) == (30, 0, 0)
    for metric in ("ttft", "jct", "tpot"):
        assert [*made[metric]] == ["mean", "p50", "p90", "p99"]
        assert 0 < made[metric]["p50"] <= made[metric]["p90"] <= made[metric]["p99"]
    assert [each["iid"] for each in made["instances"]] == ["p0", "p1", "d0", "d1"]
    assert [*made["run"]] == ["wall_s", "peak_rss_mb"] and made["run"]["wall_s"] > 0
    assert made["counters"]["prefill_tokens"] > 0 and "faults" not in made
    assert [*made["slo"]] == ["ttft_s", "tpot_s", "attainment", "goodput_per_s", "results"]


def test_limits_are_kept_or_missed(run):
    kept, missed = (
        json.loads(run(*SMALL, "--ttft", ttft, "--tpot", "9", "--json")[1])["slo"] for ttft in ("1000", "0.0001")
    )
    assert (kept["ttft_s"], kept["tpot_s"], kept["attainment"]) == (1000, 9, 1.0) and kept["goodput_per_s"] > 0
    assert (missed["attainment"], missed["results"]["ttft"]) == (0.0, 30)


@pytest.mark.parametrize("faults", [[], ["--faults", FAULTS]], ids=["plain", "faults"])
def test_the_same_arguments_give_the_same_bytes_whatever_the_hash_seed(faults):
    policies = ["--policy", "length=noisy", "--policy", "order=sjf", "--flip", "idle", "--monitor", "idle_s=0.5"]
    arguments = [*SMALL, *policies, "--prefill", "2", "--decode", "2", "--mixed", "1", *faults, "--json"]
    made = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        process = start("sim", "run", *arguments, env=environment)
        made.append(process.communicate(timeout=100)[0].partition(b', "run": ')[0])
        assert process.returncode == 0
    assert made[0] == made[1]


def test_a_trace_sped_up_and_repeated(run, tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text(HEAD + "2023-11-16 00:00:00,600,3\n2023-11-16 00:00:40,10,1\n", encoding="utf-8")
    _, out, _ = run("--trace", trace, "--speedup", 2, "--requests", 4, "--json")
    made = json.loads(out)
    assert made["requests"] == 4 and made["counters"]["prefill_tokens"] == 1220
    assert 60 < made["makespan_s"] < 61


def test_notes_on_a_trace_are_in_json_or_on_stderr(run, tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n1,600,3\n0,10,1\n2,10,0\n", encoding="utf-8")
    status, out, err = run("--trace", trace, "--json")
    made = json.loads(out)
    notes = ["rows skipped for 0 prompt or output tokens: 1"]
    notes += ["rows earlier than the one before: 1; the 2 requests are sorted by time"]
    assert (status, err, made["requests"], made["notes"]) == (0, "", 2, notes)
    assert run("--trace", trace)[2] == "".join(f"tetri-cli: {trace}: {note}\n" for note in notes)


def test_prompts_beyond_the_context_are_refused_and_said(run, tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text(HEAD + "2023-11-16 00:00:00,3000,3\n2023-11-16 00:00:01,10,2\n", encoding="utf-8")
    status, out, _ = run("--trace", trace, "--context", 2048)
    assert status == 0 and out.startswith("requests  2: 1 done, 0 failed, 1 refused\n") and "ttft" in out
    assert "1 x the prompt has 3000 tokens, the model's context holds 2048" in out


def test_policies_and_roles_change_the_outcome(run):
    arguments = ("--requests", 40, "--prompt-tokens", "1-2000", "--output-tokens", 20, "--json")
    first, second = (json.loads(run(*arguments, "--policy", f"order={order}")[1]) for order in ("fcfs", "ljf"))
    assert first["ttft"]["mean"] < second["ttft"]["mean"]
    slow = json.loads(run(*arguments, "--link", "1e8")[1])
    assert slow["jct"]["mean"] > first["jct"]["mean"] and slow["ttft"] == first["ttft"]


@pytest.mark.parametrize("system", ["coupled16", "coupled"])
def test_the_baselines_are_told_alike(run, system):
    made = json.loads(run(*SMALL, "--system", system, "--json")[1])
    assert made["done"] == 30 and [each["iid"] for each in made["instances"]] == ["c0", "c1"]
    assert [*made] == [*json.loads(run(*SMALL, "--json")[1])]


def test_a_plot(run, tmp_path):
    status, _, err = run(*SMALL, "--mixed", 1, "--plot", tmp_path / "run.png")
    assert (status, err) == (0, "")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_the_results_are_shown_although_the_plot_fails(run, tmp_path, monkeypatch):
    def full(path, times, spans):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(plots, "draw", full)
    status, out, err = run(*SMALL, "--plot", tmp_path / "run.png")
    assert status == 1 and out.startswith("requests  30: 30 done")
    assert err == f"tetri-cli: {tmp_path}/run.png: No space left on device\n"


def test_faults_are_injected_counted_and_survived(run):
    """What was asked for is told with how often it happened."""
    arguments = (*SMALL, "--prefill", 2, "--decode", 2, "--faults", FAULTS, "--json")
    status, out, err = run(*arguments)
    made = json.loads(out)
    assert (status, err, made["done"], made["requests"]) == (0, "", 30, 30)
    assert made["faults"]["promises"] == "held"
    assert [*made["faults"]["injected"]] == ["drop", "duplicate", "kill", "freeze", "disconnect"]
    assert made["faults"]["injected"]["drop"] > 10
    assert "promises: all held" in run(*arguments[:-1])[1]


def test_a_broken_promise_is_one_line_with_the_seed_and_the_time(run, monkeypatch):
    def wrong(kv, position, outputs, sampling, vocabulary, salt):
        return position % vocabulary

    monkeypatch.setattr("tetri.engine.emulated.next_token", wrong)
    monkeypatch.setattr("tetri.sim.faulty.clients.reference_tokens", lambda *_: [1])
    status, out, err = run(*SMALL, "--seed", 7, "--faults", "drop=0.01,until=5")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "a promise is broken: seed 7, " in err and " s: client 0 has [" in err


def test_the_help_explains_every_trace_and_fault(run):
    _, out, _ = run("--help")
    assert "Mooncake          timestamp, input_length, output_length (ms)" in out
    kinds = [field.name for field in fields(Faults)]
    assert [kind for kind in kinds if f"\n  {kind} " not in out] == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rate", "-1"], "the rate must be at least 0 requests per second, got -1"),
        (["--burstiness", "0"], "the burstiness must be from 0.01 to 100, got 0"),
        (["--prompt-tokens", "x"], "lengths must be N, LOW-HIGH or lognormal:MEDIAN:SIGMA"),
        (["--deadline", "0"], "the deadline must be above 0 s"),
        (["--ttft", "0"], "ttft_s must be above 0 and at most 86400 seconds, got 0"),
        (["--prefill", "0"], "there is no prefill instance: give prefill, mixed or auto at least 1"),
        (["--cost", "nowhere"], "no cost table is called 'nowhere'; known:"),
        (["--link", "fast"], "--link must be roce, nvlink or bytes a second, got 'fast'"),
        (["--flip", "never"], "unknown flip 'never'; known: none"),
        (["--transfer", "never"], "unknown transfer 'never'"),
        (["--system", "never"], "'never' is not one of 'tetri', 'coupled16', 'coupled'"),
        (["--system", "coupled", "--policy", "order=sjf"], "schedules as vLLM does: leave out --policy"),
        (["--system", "coupled", "--deadline", "3"], "leave out --deadline"),
        (["--policy", "order=x"], 'policy.order: must be one of: adaptive, fcfs, sjf, ljf, ageing, deadline, got "x"'),
        (["--policy", "order"], "--policy 'order': write key=value"),
        (["--monitor", "flip=idle"], "--monitor flip: use --flip"),
        (["--context", "99999"], "context must be at most 38992, the KV tokens of an instance, got 99999"),
        (["--plot", "run.pdf"], "--plot draws a PNG: call it FILE.png, not 'run.pdf'"),
        (["--plot", "nowhere/run.png"], "--plot: there is no folder"),
        (["--plot", "/proc/run.png"], "--plot: /proc/run.png cannot be written: "),
        (["--monitor", "idle_s=-1"], "monitor.idle_s: must be a number from 0"),
        (["--kv-tokens", "8"], "the KV of an instance holds 8 tokens"),
        (["--faults", "dorp=0.1"], "--faults: 'dorp=0.1' is no fault: use drop, duplicate, delay"),
        (["--faults", "drop=1.5"], "--faults: drop must be from 0 to 1, got 1.5"),
        (["--faults", "kill=1001"], "--faults: kill must be from 0 to 1000 a second, got 1001"),
        (["--faults", "drop=0.1,down=2000000"], "--faults: down must be from 0 to 1e+06 seconds, got 2000000"),
        (["--cuts", "p0>"], "--cuts: 'p0>' is no cut: write READER or SENDER>READER"),
        (["--cuts", "d0@file"], "--cuts: there is no file in a simulation: give seconds"),
        (["--system", "coupled", "--cuts", "d0"], "leave out --cuts"),
        (["--faults", "until=3"], "--faults: nothing would go wrong: give a fault a number above 0"),
        (["--system", "coupled", "--faults", "drop=0.1"], "leave out --faults"),
        (["--trace", "bad.csv"], "bad.csv:3: must have TIMESTAMP,ContextTokens,GeneratedTokens: a time and"),
        (["--trace", "odd.csv"], "odd.csv:1: unknown columns 'when,in,out': a trace has TIMESTAMP,ContextTokens"),
        (["--trace", "bad.csv", "--rate", "2"], "--trace brings its own times: use --speedup, not --rate"),
        (["--trace", "bad.csv", "--burstiness", "1"], "use --speedup, not --burstiness"),
        (["--trace", "bad.csv", "--output-tokens", "9"], "own lengths: use these, not --output-tokens"),
        (["--speedup", "2"], "drawn requests have --rate, not --speedup"),
    ],
)
def test_wrong_arguments_are_one_line(run, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.csv").write_text(HEAD + "2023-11-16 00:00:00,10,1\nx,1,1\n", encoding="utf-8")
    (tmp_path / "odd.csv").write_text("when,in,out\n", encoding="utf-8")
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert says in err and err.count("\n") == 1
