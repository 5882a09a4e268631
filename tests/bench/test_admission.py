"""tools/bench_admission, and the shape of what it shows: few seeds, half of the requests, less memory."""

import json
import pickle
import subprocess
from functools import cache
from pathlib import Path
from statistics import fmean

import pytest
from click.testing import CliRunner

from tetri.bench import admission
from tetri.bench.admission import AMPLE, SYSTEMS, Load, targets

REPOSITORY = Path(__file__).parents[2]
BINDING = Load(kv_tokens=14_000, requests=128)
SEEDS = 8  # with two, the order in which a few requests land changes the mean JCT by 2 %


@cache
def measured(system):
    """(mean JCT, share of requests that were preempted)."""
    runs = [admission.run(BINDING, 0.5, SYSTEMS[system], seed) for seed in range(SEEDS)]
    return fmean(each.jct_mean for each in runs), fmean(each.preempted for each in runs)


def test_since_grants_leave_memory_for_growth_no_policy_ends_requests_sooner_than_greedy():
    """What it would admit too early is still at the prefill instance. `tests/sim/test_micro.py` shows the policies
    where grants take all memory: there reserve-static is behind, as in the paper."""
    greedy, dynamic, static, peak = (measured(n)[0] for n in ("greedy", "reserve_dynamic", "reserve_static", "peak"))
    assert abs(dynamic / greedy - 1) < 0.02 and abs(static / greedy - 1) < 0.02
    assert greedy <= admission.RATIO_LIMIT * peak


def test_peak_preempts_hardly_anybody_and_nobody_with_true_lengths():
    assert measured("peak")[1] <= 0.01 < measured("greedy")[1]
    assert measured("peak ideal")[1] == 0


def test_memory_binds_here_so_that_eight_times_as_much_makes_requests_end_sooner():
    ample = fmean(admission.run(Load(8 * 14_000, 128), 0.5, SYSTEMS["greedy"], seed).jct_mean for seed in range(SEEDS))
    assert ample <= admission.BINDS * measured("greedy")[0]


def test_what_a_seed_draws_is_the_same_for_all_policies_and_comes_at_the_rate(tmp_path):
    trace = tmp_path / "trace.csv"
    lines = [f"2024-01-01 00:00:{second:02},{100 + second},{7 + second}" for second in range(40)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]) + "\n")
    load = Load(4000, 10, str(trace), rate=0.5)
    window, longest = admission.arrivals_of(load, 3)
    assert window == admission.arrivals_of(load, 3)[0] and longest == 139 + 46
    heavier = fmean(map(admission.occupancy, window)) / fmean(
        (7 + second) * (100 + second + (7 + second) / 2) for second in range(40)
    )
    assert [each.at_s for each in window] == pytest.approx([2.0 * heavier * step for step in range(10)])
    assert [each.prompt for each in window] == [window[0].prompt + step for step in range(10)]
    assert len({admission.arrivals_of(load, seed)[0][0].prompt for seed in range(9)}) > 1


def row(mean, preempted=0.0):
    return {"jct_mean": {"mean": mean, "low": mean - 1, "high": mean + 1}, "preempted": preempted}


@pytest.mark.parametrize(
    "changed, met",
    [
        ({}, True),
        ({"greedy": row(10.3)}, False),  # peak is better
        ({"greedy": row(10.1, 0.031)}, False),
        ({"peak ideal": row(10.0, 0.001)}, False),
        ({AMPLE: row(9.7)}, False),  # memory does not bind
    ],
)
def test_the_targets(changed, met):
    """Greedy within 1.02 x the best of the others, 3 % preempted, nobody by peak with true lengths; memory binds."""
    others = {name: row(11.0) for name in SYSTEMS}
    rows = others | {"greedy": row(10.1, 0.03), "peak": row(10.0), AMPLE: row(8.0)} | changed
    assert targets(rows)["ok"] is met


class Here:
    """Stands in for a pool of processes."""

    imap = staticmethod(map)

    def Pool(self, *_):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


def test_each_size_is_compared_with_eight_times_the_memory(monkeypatch):
    def simulated(load, reserve_share, rules, seed):
        return admission.Run(1e6 / load.kv_tokens + seed, 1.0, 0.02 if rules.admit == "greedy" else 0.0, 1.0)

    monkeypatch.setattr(admission, "run", simulated)
    monkeypatch.setattr(admission, "get_context", lambda _: Here())
    command = ["--kv-tokens", "10000", "--kv-tokens", "20000", "--seeds", "2", "--json"]
    done = CliRunner().invoke(admission.main, command)
    ten, twenty = json.loads(done.stdout)["points"]
    assert [ten["kv_tokens"], twenty["kv_tokens"]] == [10_000, 20_000]
    assert ten["systems"]["peak"]["jct_mean"]["mean"] == 100.5 and ten["systems"][AMPLE]["jct_mean"]["mean"] == 13.0
    assert ten["systems"][AMPLE]["over_greedy"]["mean"] == pytest.approx((12.5 / 100 + 13.5 / 101) / 2)
    assert ten["targets"]["ok"] and ten["targets"]["greedy_preempted"] == 0.02


def test_a_trace_that_is_too_short_is_one_line(tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2024-01-01 00:00:00,1,1\n")
    command = [REPOSITORY / "tools" / "bench_admission", "--trace", trace, "--json"]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == "" and "has 1 requests" in done.stderr.splitlines()[-1]


def test_a_trace_that_can_be_read_once_reaches_the_other_processes(tmp_path, monkeypatch):
    trace = tmp_path / "trace.csv"
    lines = [f"2024-01-01 00:00:{second:02},100,{second % 30}" for second in range(40)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]))

    class There(Here):
        """Has nothing but what it gets at its start."""

        def Pool(self, workers, prepare, arguments):
            sent = pickle.dumps(arguments)
            monkeypatch.setattr(admission, "_traces", {})
            trace.unlink()
            prepare(*pickle.loads(sent))
            return self

    def simulated(load, share, rules, seed):
        return admission.Run(len(admission.arrivals_of(load, seed)[0]), 1.0, 0.0, 1.0)

    monkeypatch.setattr(admission, "run", simulated)
    monkeypatch.setattr(admission, "get_context", lambda _: There())
    command = ["--trace", str(trace), "--workload", "trace", "--requests", "10", "--json"]
    done = CliRunner().invoke(admission.main, command)
    found = json.loads(done.stdout)
    assert found["points"][0]["systems"]["greedy"]["jct_mean"]["mean"] == 10
    assert found["notes"] == ["rows skipped for 0 prompt or output tokens: 2"] and found["notes"][0] in done.stderr
