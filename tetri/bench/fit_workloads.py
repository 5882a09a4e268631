"""fit_workloads: fit the mean lengths in conf/paper/workloads.toml to the paper's vLLM curves, and only to those.

    tools/fit_workloads paper_figures.json [--join 0.025] [--only LPLD]

The input is the paper's digitised curves: {"end_to_end": {workload: {"TTFT" | "JCT": {"vLLM": {"points"}}}}}. Five
statistics of the two vLLM curves are compared with those of simulated draws: mean TTFT, mean JCT, the last JCT, the
mean of the first 16 TTFTs, and the median time from the end of a request to the next single first token (a lone
prefill). The paper shows one draw, so each difference is divided by the standard deviation over draws. The output is
the posterior means of prompt_mean and output_mean over a grid, their standard deviations, the least chi-squared and the
log evidence. --join, the one parameter that all workloads share, was chosen by the sum of the log evidence.
"""

from __future__ import annotations

import json
import math
import tomllib
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean, median, stdev
from typing import Any, TextIO

import click

from tetri import cost
from tetri.bench.report import Program, as_json, give, progress
from tetri.policy.coupled import CoupledLimits
from tetri.sim import coupled, workloads
from tetri.sim.workloads import Baseline, Workload

STEPS, WIDTH = 11, 0.3  # points of the grid around the file's means, and its relative half-width
LEAST_SPREAD = 0.02  # the curves were digitised to about 1 %


@dataclass(frozen=True, slots=True)
class Fit:
    """The fit of one workload: posterior means over the grid and their standard deviations, in tokens; the least
    chi-squared; the logarithm of the evidence."""

    prompt_mean: float
    output_mean: float
    prompt_stdev: float
    output_stdev: float
    chi_squared: float
    log_evidence: float


def samples(curve: Mapping[str, Any], requests: int) -> list[float]:
    """Return the sorted values of a digitised CDF with this number of requests."""
    points = curve["points"]
    values, before = [points[0][0]], points[0][1]
    for x, share in points:
        if share > before + 1e-3:
            values += [x] * max(1, round((share - before) * requests))
            before = share
    return sorted(values)


def statistics(ttfts: Sequence[float], jcts: Sequence[float]) -> list[float]:
    """Return the logarithms of the five statistics that are compared."""
    firsts, ends = sorted(ttfts), sorted(jcts)
    return [math.log(x) for x in (fmean(firsts), fmean(ends), ends[-1], fmean(firsts[:16]), lone_prefill(firsts, ends))]


def lone_prefill(firsts: Sequence[float], ends: Sequence[float]) -> float:
    """Return the median time between the end of a request and the single first token of the one that got its slot."""
    times = sorted({round(x, 3) for x in firsts})
    gaps = []
    for before, x in zip(times, times[1:], strict=False):
        place = bisect_left(ends, x - 0.02)
        alone = sum(abs(each - x) < 0.002 for each in firsts) == 1
        if alone and place and ends[place - 1] >= before - 0.002:
            gaps.append(x - ends[place - 1])
    return median(gaps)


def chi_squared(workload: Workload, wanted: Sequence[float], baseline: Baseline, table: cost.Cost, draws: int) -> float:
    """Return chi-squared of the means over `draws` draws against the wanted statistics, with their spread as error."""
    limits = CoupledLimits(baseline.slots, baseline.step_tokens, table.kv_tokens)
    rows = []
    for seed in range(draws):
        served = coupled.run("prefill_first", limits, table, workload.draw(5000 + seed), 1, baseline.join_s).served
        rows.append(statistics([request.ttft_s for request in served], [request.jct_s for request in served]))
    off = (
        ((fmean(column) - value) / max(stdev(column), LEAST_SPREAD)) ** 2
        for column, value in zip(zip(*rows, strict=True), wanted, strict=True)
    )
    return float(sum(off))


def posterior(
    name: str, wanted: Sequence[float], file: Mapping[str, Any], baseline: Baseline, table: cost.Cost, draws: int
) -> Fit:
    """Fit one workload of `file` to curves with the statistics `wanted`."""
    rows = file["workload"][name]
    sources = {part: [tuple(pair) for pair in file["figure1"][part]] for part in ("prompt", "output")}
    scale = [1 - WIDTH + 2 * WIDTH * i / (STEPS - 1) for i in range(STEPS)]

    def lengths(part: str) -> list[tuple[float, Any]]:
        means = [factor * rows[f"{part}_mean"] for factor in scale]
        low, high = rows[part]
        return [(mean, workloads.tilted(sources[part], low, high, mean)) for mean in means if mean > low]

    found = []
    for prompt_mean, prompt in lengths("prompt"):
        for output_mean, output in lengths("output"):
            workload = workloads.Workload(name, rows["requests"], file["context"], prompt, output)
            found.append((prompt_mean, output_mean, chi_squared(workload, wanted, baseline, table, draws)))
    weights = [math.exp(-chi / 2) for _, _, chi in found]
    total = math.fsum(weights)

    def moments(values: Sequence[float]) -> tuple[float, float]:
        mean = sum(w * value for w, value in zip(weights, values, strict=True)) / total
        return mean, math.sqrt(sum(w * (value - mean) ** 2 for w, value in zip(weights, values, strict=True)) / total)

    prompt_mean, prompt_stdev = moments([each for each, _, _ in found])
    output_mean, output_stdev = moments([each for _, each, _ in found])
    least, evidence = min(chi for _, _, chi in found), math.log(total / len(found))
    return Fit(prompt_mean, output_mean, prompt_stdev, output_stdev, least, evidence)


@click.command(cls=Program)
@click.argument("figures", type=click.File(encoding="utf-8"))
@click.option("--join", type=float, help="Extra seconds of a step with prompts. Default: the file's.")
@click.option("--only", help="Fit only this workload.")
@click.option("--draws", type=click.IntRange(2), default=40, show_default=True, help="Draws at each point of the grid.")
@as_json
def main(figures: TextIO, join: float | None, only: str | None, draws: int, as_json: bool) -> None:
    """Fit the means of conf/paper/workloads.toml to the digitised vLLM curves in FIGURES, which is JSON:
    {"end_to_end": {workload: {"TTFT" | "JCT": {"vLLM": {"points"}}}}}."""
    file = tomllib.loads(workloads.default_file().read_text(encoding="utf-8"))
    baseline = workloads.load().baseline
    if join is not None:
        baseline = replace(baseline, join_s=join)
    table, found = cost.load("v100-opt13b"), {}
    if only not in (None, *file["workload"]):
        raise click.UsageError(f"--only: unknown workload {only!r}: {', '.join(file['workload'])}")
    requests = {name: rows["requests"] for name, rows in file["workload"].items() if only in (None, name)}
    for name, sides in measured(figures, requests).items():
        found[name] = asdict(posterior(name, statistics(*sides), file, baseline, table, draws))
        progress(shown(name, found[name]))
    evidence = sum(each["log_evidence"] for each in found.values())
    text = [shown(name, each) for name, each in found.items()]
    text.append(f"join_s {baseline.join_s}: log evidence {evidence:.2f}")
    give({"join_s": baseline.join_s, "log_evidence": evidence, "workloads": found}, "\n".join(text), as_json)


def measured(figures: TextIO, requests: Mapping[str, int]) -> dict[str, list[list[float]]]:
    """Return the samples of TTFT and JCT of each workload with this number of requests. Raises UsageError."""
    try:
        curves = json.load(figures)["end_to_end"]
        return {
            name: [samples(curves[name][metric]["vLLM"], count) for metric in ("TTFT", "JCT")]
            for name, count in requests.items()
        }
    except (ValueError, TypeError, LookupError) as error:
        raise click.UsageError(f"{figures.name}: not the digitised curves: {error!r}") from None


def shown(name: str, found: Mapping[str, float]) -> str:
    """Format the fit of one workload as a line."""
    return (
        f"{name:6} prompt_mean {found['prompt_mean']:5.0f} +- {found['prompt_stdev']:.0f},"
        f" output_mean {found['output_mean']:5.1f} +- {found['output_stdev']:.1f},"
        f" least chi-squared {found['chi_squared']:.2f}, log evidence {found['log_evidence']:.2f}"
    )


if __name__ == "__main__":
    main(prog_name="fit_workloads")
