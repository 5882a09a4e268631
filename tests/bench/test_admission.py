"""tools/bench_admission, and the shape of what it shows: few seeds, half of the requests, half of the memory."""

import subprocess
from functools import cache
from pathlib import Path
from statistics import fmean

import pytest

from tetri.bench import admission
from tetri.bench.admission import Load, SimError, binding, loads_for, targets

REPOSITORY = Path(__file__).parents[2]
BINDING = Load(kv_tokens=14_000, requests=128)
SEEDS = 2


@cache
def measured(system):
    """(mean JCT, share of requests that were preempted)."""
    runs = [admission.run(BINDING, 0.5, admission.SYSTEMS[system], seed) for seed in range(SEEDS)]
    return fmean(each.jct_mean for each in runs), fmean(each.preempted for each in runs)


def test_peak_preempts_hardly_anybody_and_ends_requests_nearly_as_soon_as_the_best():
    (greedy, often), (dynamic, _), (peak, seldom) = map(measured, ("greedy", "reserve_dynamic", "peak"))
    assert often > 0.02 and seldom <= 0.01
    assert peak <= 1.05 * min(greedy, dynamic)
    assert measured("peak ideal")[1] == 0


def test_the_papers_admissions_are_alike_since_grants_leave_two_blocks_for_each_running_request():
    """What one of them would admit too early is still at the prefill instance. `tests/sim/test_micro.py` shows them
    where grants take all memory: there reserve-static is behind, as in the paper."""
    greedy, dynamic, static = (measured(name)[0] for name in ("greedy", "reserve_dynamic", "reserve_static"))
    assert abs(dynamic / greedy - 1) < 0.02 and abs(static / greedy - 1) < 0.02


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


def test_the_first_load_that_binds_is_taken():
    loads = loads_for("paper", 1.0, None, "", 0)
    capacities = [load.kv_tokens for load in loads]
    assert capacities == sorted(capacities, reverse=True) and capacities[0] == 2 * 39_000
    halves = loads_for("paper", 0.5, loads[3], "", 0)
    assert [load.kv_tokens for load in halves] == [loads[3].kv_tokens // 2]
    rates = [load.rate for load in loads_for("trace", 2.0, None, "file", 50)]
    assert rates == sorted(rates) and rates[-1] > 5

    def mapped(_, prefill_requests):
        return [admission.Run(1.0, 1.0, 0.0 if load.kv_tokens > 40_000 else 0.07, 1.0) for load, *_ in prefill_requests]

    said = []
    assert binding(loads, 2, 0.06, 0.5, mapped, said.append).kv_tokens == 39_000
    assert len(said) == capacities.index(39_000) + 1 and "7.0%" in said[-1]
    with pytest.raises(SimError, match="never preempts 10%"):
        binding(loads, 2, 0.1, 0.5, mapped, said.append)


def row(mean, preempted, spread=0.5):
    return {"jct_mean": {"mean": mean, "low": mean - spread, "high": mean + spread}, "preempted": preempted}


@pytest.mark.parametrize(
    "peak, met",
    [((10.1, 0.01), True), ((10.3, 0.01), False), ((10.1, 0.011), False), ((10.1, 0.01, 1.0), False)],
)
def test_the_targets(peak, met):
    """1.02 x the better, apart from one of them, and 1 % preempted."""
    rows = {"greedy": row(11.5, 0.06), "reserve_dynamic": row(10.0, 0.06), "peak": row(*peak)}
    assert targets(rows)["ok"] is met


def test_a_trace_that_is_too_short_is_one_line(tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2024-01-01 00:00:00,1,1\n")
    command = [REPOSITORY / "tools" / "bench_admission", "--trace", trace, "--json"]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == "" and "has 1 requests" in done.stderr.splitlines()[-1]
