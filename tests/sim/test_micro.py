"""The paper's small experiments, by shape (with few draws; `tetri-cli sim paper` has more)."""

from functools import cache
from statistics import fmean

from tetri import cost
from tetri.sim import micro, workloads

SEEDS = 2


@cache
def inputs():
    return workloads.load(), cost.load("v100-opt13b")


def mean(run, *arguments, what="", seeds=SEEDS):
    return fmean(run(*arguments, *inputs(), seed)[what] for seed in range(seeds))


def test_shortest_first_gains_with_the_window_and_longest_first_loses():
    fcfs, sjf16, ljf16, sjf32, sjf64, sjf128 = (mean(micro.prefill_ttft, *each) for each in micro.ORDERS)
    assert sjf128 < sjf64 < sjf32 < sjf16 < fcfs < ljf16
    assert -0.12 < sjf16 / fcfs - 1 < -0.03 and sjf128 / sjf16 < 0.65
    assert fcfs / mean(micro.vllm_ttft) < 0.2  # 16 slots wait for decodes


def test_on_imperfect_predictions_reserve_dynamic_is_greedy_and_reserve_static_is_worse(monkeypatch):
    for name, value in (("ADMITTED", 128), ("ADMITTED_KV", 16_000), ("FEEDERS", 4)):  # half of the figure's: faster
        monkeypatch.setattr(micro, name, value)
    greedy, dynamic, static = (
        mean(micro.admitted, admit, 0.749, seeds=1) for admit in ("greedy", "reserve_dynamic", "reserve_static")
    )
    assert abs(dynamic / greedy - 1) < 0.04
    assert static > 1.04 * dynamic


def test_spreading_heavy_decodes_gains_more_the_more_instances_there_are():
    gaps, heavy = {}, {}
    for instances, seeds in ((2, 8), (8, 4)):
        two, random = (
            [micro.decode_time(name, instances, *inputs(), seed) for seed in range(seeds)]
            for name in ("power_of_two", "random")
        )
        gaps[instances] = 1 - fmean(run[""] for run in two) / fmean(run[""] for run in random)
        heavy[instances] = [fmean(run["most heavy"] for run in runs) for runs in (two, random)]
    assert gaps[8] > gaps[2] > 0
    assert heavy[8][0] < heavy[8][1] - 1  # of 64 on 8 instances
    worst = micro.decode_time("imbalance", 8, *inputs(), 0)
    assert worst["most heavy"] > 56 and worst[""] > 1.5 * random[0][""]
