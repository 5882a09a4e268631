"""Fit the means of conf/paper/workloads.toml to the paper's vLLM curves, and only to those.

    .venv/bin/python tools/fit_workloads.py paper_figures.json [--join 0.025] [--only LPLD]

The figures are the paper's digitised curves: {"end_to_end": {workload: {"TTFT" | "JCT": {"vLLM": {"points"}}}}}.
Five statistics of the two vLLM curves are compared with those of simulated draws: mean TTFT, mean JCT, the last JCT,
the mean of the first 16 TTFTs, and the median time from an end to the next single first token (a lone prefill). The
paper shows one draw, so each difference counts in units of its spread over draws. Printed are the posterior means of
prompt_mean and output_mean over a grid, their standard deviations, the least chi-squared and the logarithm of the
evidence, by whose sum --join, the one parameter that all workloads share, was chosen.
"""

from __future__ import annotations

import argparse
import json
import math
import tomllib
from bisect import bisect_left
from pathlib import Path
from statistics import fmean, median, stdev

from tetri import cost
from tetri.policy.coupled import CoupledLimits
from tetri.sim import coupled, workloads

STEPS, WIDTH = 11, 0.3  # of the grid around the file's means, and how far it reaches
LEAST_SPREAD = 0.02  # the curves were read off to about 1 %


def samples(curve, requests):
    """The values that a digitised CDF shows; the smallest is where it begins."""
    points = curve["points"]
    values, before = [points[0][0]], points[0][1]
    for x, share in points:
        if share > before + 1e-3:
            values += [x] * max(1, round((share - before) * requests))
            before = share
    return sorted(values)


def statistics(ttfts, jcts):
    firsts, ends = sorted(ttfts), sorted(jcts)
    return [math.log(x) for x in (fmean(firsts), fmean(ends), ends[-1], fmean(firsts[:16]), lone_prefill(firsts, ends))]


def lone_prefill(firsts, ends):
    """The median time between an end and the first token that follows it alone, of the request that took its slot."""
    times = sorted({round(x, 3) for x in firsts})
    gaps = []
    for before, x in zip(times, times[1:], strict=False):
        place = bisect_left(ends, x - 0.02)
        alone = sum(abs(each - x) < 0.002 for each in firsts) == 1
        if alone and place and ends[place - 1] >= before - 0.002:
            gaps.append(x - ends[place - 1])
    return median(gaps)


def chi_squared(workload, wanted, baseline, table, draws):
    limits = CoupledLimits(baseline.slots, baseline.step_tokens, table.kv_tokens)
    rows = []
    for seed in range(draws):
        prefill_requests = coupled.run(
            "prefill_first", limits, table, workload.draw(5000 + seed), 1, baseline.join_s
        ).requests
        rows.append(
            statistics(
                [request.ttft_s for request in prefill_requests], [request.jct_s for request in prefill_requests]
            )
        )
    return sum(
        ((fmean(column) - value) / max(stdev(column), LEAST_SPREAD)) ** 2
        for column, value in zip(zip(*rows, strict=True), wanted, strict=True)
    )


def posterior(name, wanted, file, baseline, table, draws):
    """(prompt_mean, output_mean, their deviations, least chi-squared, log evidence)"""
    rows = file["workload"][name]
    sources = {part: [tuple(pair) for pair in file["figure1"][part]] for part in ("prompt", "output")}
    scale = [1 - WIDTH + 2 * WIDTH * i / (STEPS - 1) for i in range(STEPS)]

    def lengths(part):
        means = [factor * rows[f"{part}_mean"] for factor in scale]
        return [(mean, workloads.tilted(sources[part], *rows[part], mean)) for mean in means if mean > rows[part][0]]

    found = []
    for prompt_mean, prompt in lengths("prompt"):
        for output_mean, output in lengths("output"):
            workload = workloads.Workload(name, rows["requests"], file["context"], prompt, output)
            found.append((prompt_mean, output_mean, chi_squared(workload, wanted, baseline, table, draws)))
    weights = [math.exp(-chi / 2) for _, _, chi in found]
    total = math.fsum(weights)
    means = [sum(w * row[i] for w, row in zip(weights, found, strict=True)) / total for i in (0, 1)]
    spreads = [
        math.sqrt(sum(w * (row[i] - means[i]) ** 2 for w, row in zip(weights, found, strict=True)) / total)
        for i in (0, 1)
    ]
    return *means, *spreads, min(chi for _, _, chi in found), math.log(total / len(found))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("figures", type=Path)
    parser.add_argument("--join", type=float, help="seconds; default: as in the file")
    parser.add_argument("--only", help="one workload")
    parser.add_argument("--draws", type=int, default=40)
    options = parser.parse_args()
    figures = json.loads(options.figures.read_text(encoding="utf-8"))["end_to_end"]
    file = tomllib.loads(workloads.default_file().read_text(encoding="utf-8"))
    baseline = workloads.load().baseline
    if options.join is not None:
        baseline = workloads.Baseline(baseline.slots, baseline.step_tokens, options.join)
    table, evidence = cost.load("v100-opt13b"), 0.0
    for name, rows in file["workload"].items():
        if options.only in (None, name):
            curves = [samples(figures[name][metric]["vLLM"], rows["requests"]) for metric in ("TTFT", "JCT")]
            made = posterior(name, statistics(*curves), file, baseline, table, options.draws)
            evidence += made[-1]
            print(
                f"{name:6} prompt_mean {made[0]:5.0f} +- {made[2]:.0f}, output_mean {made[1]:5.1f} +- {made[3]:.1f},"
                f" least chi-squared {made[4]:.2f}, log evidence {made[5]:.2f}",
                flush=True,
            )
    print(f"join_s {baseline.join_s}: log evidence {evidence:.2f}")


if __name__ == "__main__":
    main()
