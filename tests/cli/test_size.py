"""tetri-cli size: the answer for the configured and for other hardware, and one line for what cannot be."""

import json
import os
import shlex
import shutil
from functools import partial

import pytest

from tetri import cost
from tetri.cli.size import command
from tetri.sim import pools, sizing

LOAD = ("--rate", "20", "--prompt", "100", "--output", "8", "--ttft", "0.3", "--tpot", "0.05")
V100 = ("--cost", "v100-opt13b")


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The folder of measured tables, with one of the default model."""
    monkeypatch.setenv("TETRI_CACHE", str(tmp_path))
    (tmp_path / "cost").mkdir()
    shutil.copy(cost.TABLES / "cpu-smollm2.toml", tmp_path / "cost" / "smollm2-135m-0a.toml")
    return tmp_path / "cost"


@pytest.fixture
def run(run, place, monkeypatch, kept):
    """`tetri-cli size`, by fewer requests: (exit status, stdout, stderr)."""
    monkeypatch.setattr(pools, "REQUESTS", 300)
    monkeypatch.setattr(pools, "LONGER", (1,))
    monkeypatch.setattr(sizing, "checked", partial(sizing.checked, requests=100))
    return partial(run, "size")


def test_json_has_what_is_enough_and_what_one_fewer_does(run):
    status, out, err = run(*LOAD, *V100, "--json")
    made = json.loads(out)
    assert (status, err) == (0, "") and made["verified"] == []
    assert made["goal"] == {"rate": 20, "ttft_s": 0.3, "tpot_s": 0.05, "share": 0.9}
    prefill, decode, coupled = (made[role] for role in ("prefill", "decode", "coupled"))
    assert prefill["enough"]["ttft_s"] <= 0.3 and not prefill["enough"]["falls_behind"]
    assert prefill["bound"] in ("compute", "ttft") and prefill["enough"]["tpot_s"] is None
    assert decode["enough"]["tpot_s"] <= 0.05 and 0 < decode["enough"]["memory"] < 1
    assert coupled["enough"]["ttft_s"] <= 0.3 and coupled["enough"]["tpot_s"] <= 0.05
    half = json.loads(run("--rate", "40", *LOAD[2:], *V100, "--json")[1])
    assert half["prefill"]["fewer"]["falls_behind"] and half["prefill"]["fewer"]["ttft_s"] is None
    assert half["prefill"]["bound"] == "compute"


def test_the_table_names_the_percentile_and_the_bounds(run):
    load = ("--rate", "40", *LOAD[2:6], "--ttft", "0.3", "--tpot", "0.2")
    status, out, err = run(*load, *V100, "--share", "0.95", "--kv-tokens", "400", "--max-batch", "40")
    lines = out.splitlines()
    assert (status, err) == (0, "") and lines[0].startswith("2 prefill + ") and "TTFT p95" in out
    assert "  instances of 400 tokens of KV, 512 tokens a chunk, 40 requests a batch" in lines
    rows = {line[:13].strip(): line for line in lines if line}
    assert {"prefill", "decode", "coupled alone", "one fewer"} <= {*rows} and "KV memory" in rows["decode"]
    assert "falls behind more and more" in out and "--verify" in lines[-1]


def test_the_least_rate_is_served_as_one_request_is(run):
    out = run("--rate", "1e-6", *LOAD[2:], *V100)[1]
    (decode,) = [line.split() for line in out.splitlines() if line.startswith("decode")]
    assert decode[:6] == ["decode", "1", "0%", "-", *decode[4:6]] and decode[5] == "ms" and float(decode[4]) > 20


def test_the_configuration_describes_the_hardware(run):
    conf = ("--conf", "conf/emulated.toml", "--set", "engine.cost=v100-opt13b.toml", "--set", "emulated.blocks=512")
    status, out, _ = run(*LOAD, *conf, "--set", "engine.max_batch=7", "--set", "engine.chunk_tokens=256")
    assert status == 0 and "  instances of 8192 tokens of KV, 256 tokens a chunk, 7 requests a batch" in out
    # By default a CPU: 1 GiB with 23,040 bytes a token, in blocks of 128.
    out = run("--rate", "2", *LOAD[2:])[1]
    assert "  instances of 46592 tokens of KV, 512 tokens a chunk, 32 requests a batch" in out
    assert "40 tokens a chunk" in run("--rate", "2", *LOAD[2:], "--chunk-tokens", "40")[1]


def test_the_hardware_is_that_of_the_table_that_was_measured_last(run, kept):
    for name, token_bytes, age_s in (("smollm2-135m-0b", 2 * 23040, 90), ("other-0c", 99, 0)):
        path = kept / f"{name}.toml"
        path.write_text((kept / "smollm2-135m-0a.toml").read_text().replace("= 23040", f"= {token_bytes}"))
        os.utime(path, times=(at := path.stat().st_mtime - age_s, at))
    assert "  instances of 46592 tokens of KV" in run("--rate", "2", *LOAD[2:])[1]
    os.utime(kept / "smollm2-135m-0a.toml", times=(1, 1))
    assert "  instances of 23296 tokens of KV" in run("--rate", "2", *LOAD[2:])[1]
    assert "no cost table" in run("--rate", "2", *LOAD[2:], "--set", "model.name=third")[2]


def test_a_link_that_carries_less_than_prompts_need_more_instances(run):
    slow = json.loads(run(*LOAD, *V100, "--link", "5e8", "--tpot", "0.2", "--json")[1])["decode"]
    assert slow["bound"] == "link" and slow["enough"]["instances"] > 20 * 100 * 819200 / 5e8


@pytest.mark.parametrize("example", command.epilog.splitlines()[2:])
def test_the_examples_of_its_help_have_an_answer(run, example):
    arguments = [each for each in shlex.split(example, comments=True)[2:] if each != "--verify"]
    status, out, err = run(*arguments)
    assert (status, err) == (0, "") and " prefill + " in out


def test_the_lengths_of_a_trace(run, tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0,100,8\n9,100,8\n", encoding="utf-8")
    limits = ("--rate", "20", "--ttft", "0.3", "--tpot", "0.05", *V100, "--json")
    traced, drawn = (json.loads(run(*limits, *of)[1]) for of in (("--trace", trace), LOAD[2:6]))
    assert traced == drawn
    trace.write_text(trace.read_text(encoding="utf-8") + "10,100,8\n" * pools.SAMPLE, encoding="utf-8")
    assert json.loads(run(*limits, "--trace", trace)[1]) == drawn


def test_verify_simulates_the_answer_and_one_fewer_of_each(run, monkeypatch):
    status, out, _ = run(*LOAD, *V100, "--verify", "--json")
    made = json.loads(out)["verified"]
    assert status == 0 and [each["reached"] for each in made] == [each["expected"] for each in made]
    assert "Simulated with the live schedulers" in (shown := run(*LOAD, *V100, "--verify")[1])
    assert "keeps the limits" in shown and "unlike" not in shown

    def contradicts(*arguments):
        return [sizing.Checked(2, 1, 0.1, 0.01, expected=True, reached=False, sure=False)]

    monkeypatch.setattr(sizing, "checked", contradicts)
    status, out, _ = run(*LOAD, *V100, "--verify")
    says = "misses a limit, but only just, unlike the model"
    assert status == 1 and out.endswith(f"  2 + 1: TTFT 100.0 ms, TPOT 10.0 ms: {says}\n")


def test_coupled_instances_that_cannot(run, monkeypatch):
    monkeypatch.setattr(sizing, "MOST", 2)
    limits = ("--ttft", "0.1", "--tpot", "0.04", *V100)
    out = run("--rate", "14", *LOAD[2:6], *limits)[1]
    assert "coupled alone: no number of instances keeps the limits" in out
    assert json.loads(run("--rate", "14", *LOAD[2:6], *limits, "--json")[1])["coupled"] is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--ttft", "0.05"], "ttft 0.05 s: the prefill of a request alone takes 0.0"),
        (["--tpot", "0.01"], "tpot 0.01 s: a token of a request alone takes 0.0"),
        (["--rate", "0"], "0.0 is not in the range 1e-06<=x"),
        (["--rate", "1e-300"], "1e-300 is not in the range 1e-06<=x"),
        (["--rate", "inf"], "inf is not in the range"),
        (["--tpot", "nan"], "must be numbers"),
        (["--share", "1"], "1.0 is not in the range"),
        (["--prompt", "many"], "lengths must be N, LOW-HIGH or lognormal:MEDIAN:SIGMA"),
        (["--output", "0"], "lengths must be N"),
        (["--prompt", "50000"], "a request of 50008 tokens is longer than the 38992 that an instance holds"),
        (["--cost", "h900"], "no cost table is called 'h900'"),
        (["--link", "fast"], "--link must be roce, nvlink or bytes a second"),
        (["--max-batch", "600"], "max_batch must be below chunk_tokens (512)"),
        (["--conf", "conf/emulated.toml"], "leave out --conf and --set"),
        (["--trace", "nowhere.csv"], "--trace brings its own lengths"),
    ],
)
def test_what_cannot_be_is_one_line(run, arguments, says):
    status, out, err = run(*LOAD, *V100, *arguments)
    assert status == 2 and out == "" and says in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--conf", "conf/emulated.toml", *LOAD], "there is no cost table for this configuration (engine.cost)"),
        ([*LOAD[:4], *LOAD[6:]], "give --prompt and --output"),
        (LOAD[2:], "Missing option '--rate'"),
    ],
)
def test_what_is_missing_is_one_line(run, arguments, says):
    status, out, err = run(*arguments)
    assert status == 2 and out == "" and says in err and err.count("\n") == 1
