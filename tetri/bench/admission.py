"""bench_admission: compare decode admission policies where KV memory is scarce: mean JCT and preemptions by policy.

Simulates the live cores with one decode instance and enough prefill instances that only the decode instance limits.
Two workloads: `paper` is 256 requests of the paper's Mixed that arrive together, as in Figure 18; `trace` is a window
of a file of real arrivals (--trace), a different one for each seed.

Memory is scarce where more of it would help: greedy admission also runs with 8 times the memory, and memory binds if
its mean JCT is then at least 5 % shorter. If it does not bind, all policies are equal and no target is met.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from random import Random
from statistics import fmean
from time import perf_counter
from typing import Any, TypeVar

import click

from tetri import cost
from tetri.bench.report import Program, Progress, as_json, give, interval, progress, table
from tetri.metrics import percentile
from tetri.policy.rules import Rules
from tetri.sim import workloads
from tetri.sim.setup import Setup, SimError
from tetri.sim.traces import Arrival, TraceError, replayed
from tetri.sim.world import World

COST = "v100-opt13b"
CLOSED = 256  # requests of Figure 18
FEEDERS = {"paper": 8, "trace": 2}  # prefill instances
KV_TOKENS = {"paper": 24_000, "trace": 39_000}  # as in Figure 18 (sim/micro.py), and as in the cost table
#: The reserve policies use the low end of the range, as in the paper; peak uses the high end. Ideal: exact lengths.
SYSTEMS = {
    "greedy": Rules(order="sjf", admit="greedy", length="noisy"),
    "reserve_static": Rules(order="sjf", admit="reserve_static", length="noisy", admit_end="low"),
    "reserve_dynamic": Rules(order="sjf", admit="reserve_dynamic", length="noisy", admit_end="low"),
    "peak": Rules(order="sjf", admit="peak", length="noisy", admit_end="high"),
    "peak ideal": Rules(order="sjf", admit="peak", length="oracle"),
}
RIVALS = ("reserve_static", "reserve_dynamic", "peak")  # of greedy, the default
AMPLE, TIMES = "greedy, 8 x the memory", 8
BINDS = 0.95  # with ample memory greedy's mean JCT is at most this share
RATIO_LIMIT = 1.02  # the largest ratio of greedy's mean JCT to its best rival's
PREEMPTED_LIMIT = 0.03  # the largest share of requests that greedy preempts


@dataclass(frozen=True, slots=True)
class Load:
    """The load of a decode instance with `kv_tokens`. With a `trace` file, `requests` consecutive requests of it arrive
    at `rate` average requests per second: a request with twice the mean `occupancy` of the trace counts twice. The
    times between them are scaled by one factor. Without a trace: the closed batch."""

    kv_tokens: int
    requests: int = CLOSED
    trace: str = ""
    rate: float = 0.0

    @property
    def name(self) -> str:
        """The workload: trace or paper."""
        return "trace" if self.trace else "paper"


@dataclass(frozen=True, slots=True)
class Run:
    """The result of one simulation; times in seconds. `preempted`: the share of requests that were preempted."""

    jct_mean: float
    jct_p99: float
    preempted: float
    makespan_s: float


def arrivals_of(load: Load, seed: int) -> tuple[list[Arrival], int]:
    """Return the requests and the longest context of any request, in tokens. Raises TraceError."""
    if not load.trace:
        mixed = _paper().workloads["Mixed"]
        return mixed.draw(seed, load.requests), mixed.context
    whole = _trace(load.trace)
    first = Random(f"window {seed}").randrange(len(whole) - load.requests + 1)
    window = whole[first : first + load.requests]
    start, lasts = window[0].at_s, window[-1].at_s - window[0].at_s
    if lasts <= 0:
        raise TraceError(f"{load.requests} requests of {load.trace} arrive at the same time: use more")
    heavier = fmean(map(occupancy, window)) / fmean(map(occupancy, whole))
    stretch = (load.requests - 1) * heavier / load.rate / lasts
    longest = max(each.prompt + each.output for each in whole)
    return [Arrival((each.at_s - start) * stretch, each.prompt, each.output) for each in window], longest


def occupancy(arrival: Arrival) -> float:
    """Return how much of a decode instance's memory a request uses: KV tokens times steps."""
    return arrival.output * (arrival.prompt + arrival.output / 2)


@cache
def _paper() -> workloads.Evaluation:
    return workloads.load()


_traces: dict[str, list[Arrival]] = {}  # by path


def _trace(path: str) -> list[Arrival]:
    if path not in _traces:
        _traces[path] = [*replayed(path).arrivals]
    return _traces[path]


def _share(traces: dict[str, list[Arrival]]) -> None:
    """Give this process the traces that another has read: a pipe can be read once."""
    _traces.update(traces)


def run(load: Load, reserve_share: float, rules: Rules, seed: int) -> Run:
    """Simulate one load with one policy. Raises SimError or TraceError."""
    arrivals, context = arrivals_of(load, seed)
    setup = Setup(
        cost=replace(cost.load(COST), predictor_s=0.0, predictor_token_s=0.0),  # predictions take no time
        prefill=FEEDERS[load.name],
        rules=rules,
        kv_tokens=load.kv_tokens,
        context=context,
        reserve_share=reserve_share,
        seed=seed,
    )
    result = World(setup, arrivals).run()
    done = result.done()
    if len(done) != len(arrivals):
        raise SimError(f"only {len(done)} of {len(arrivals)} requests were served")
    times = [outcome.jct_s or 0.0 for outcome in done]
    preempted = fmean(outcome.preempted > 0 for outcome in done)
    return Run(fmean(times), percentile(times, 0.99), preempted, result.end_s)


PrefillRequest = tuple[Load, float, Rules, int]  # the arguments of `run`
F = TypeVar("F", bound=Callable[..., Any])
Mapped = Callable[[Callable[[PrefillRequest], Run], Iterable[PrefillRequest]], Any]


def _one(request: PrefillRequest) -> Run:
    return run(*request)


def compare(load: Load, seeds: int, share: float, mapped: Mapped, progress: Progress) -> dict[str, Any]:
    """Compare all systems with the same requests and predictions."""
    ample = replace(load, kv_tokens=TIMES * load.kv_tokens)
    cases = [*((name, load, rules) for name, rules in SYSTEMS.items()), (AMPLE, ample, SYSTEMS["greedy"])]
    prefill_requests = [(memory, share, rules, seed) for _, memory, rules in cases for seed in range(seeds)]
    runs: list[Run] = []
    for made in mapped(_one, prefill_requests):
        runs.append(made)
        if len(runs) % seeds == 0:
            progress(f"{load.name}, {load.kv_tokens} tokens of KV: {len(runs) // seeds} of {len(cases)} systems")
    by_name = {name: runs[place * seeds : (place + 1) * seeds] for place, (name, *_) in enumerate(cases)}
    rows = {name: _row(mine, by_name["greedy"]) for name, mine in by_name.items()}
    settings = {**asdict(load), "trace": Path(load.trace).name}
    return {"workload": load.name, **settings, "seeds": seeds, "systems": rows, "targets": targets(rows)}


def _row(runs: Sequence[Run], greedy: Sequence[Run]) -> dict[str, Any]:
    return {
        "jct_mean": interval([each.jct_mean for each in runs]),
        "jct_p99": fmean(each.jct_p99 for each in runs),
        "preempted": fmean(each.preempted for each in runs),
        "makespan_s": fmean(each.makespan_s for each in runs),
        # paired: both have the same requests and predictions
        "over_greedy": interval([mine.jct_mean / its.jct_mean for mine, its in zip(runs, greedy, strict=True)]),
    }


def targets(rows: dict[str, Any]) -> dict[str, Any]:
    """Return whether memory binds, whether greedy, the default, is as good as its best rival then, and whether `peak`
    never preempts with true lengths."""
    mean = {name: row["jct_mean"]["mean"] for name, row in rows.items()}
    ratio = mean["greedy"] / min(mean[name] for name in RIVALS)
    binds = mean[AMPLE] <= BINDS * mean["greedy"]
    preempted, ideal = rows["greedy"]["preempted"], rows["peak ideal"]["preempted"]
    return {
        "memory_binds": binds,
        "greedy_over_best": ratio,
        "limit": RATIO_LIMIT,
        "greedy_preempted": preempted,
        "preempted_limit": PREEMPTED_LIMIT,
        "peak_ideal_preempted": ideal,
        "ok": binds and ratio <= RATIO_LIMIT and preempted <= PREEMPTED_LIMIT and ideal == 0,
    }


# ---------------------------------------------------------------- the program


def _option(name: str, kind: Any, default: Any, text: str, **more: Any) -> Callable[[F], F]:
    return click.option(name, type=kind, default=default, show_default=True, help=text, **more)


@click.command(cls=Program)
@click.option("--trace", type=click.Path(exists=True, dir_okay=False),
              help="Arrivals of the workload trace, as of tetri-cli sim run.")  # fmt: skip
@click.option("--workload", type=click.Choice(("paper", "trace")), multiple=True,
              help="May be repeated. Default: paper, and trace if there is one.")  # fmt: skip
@_option("--requests", click.IntRange(10), 1000, "Requests in one window of the trace.")
@_option("--rate", click.FloatRange(0, min_open=True), 1.51, "Requests per second of the trace.")
@click.option("--kv-tokens", type=click.IntRange(4096), multiple=True,
              help="Size of the KV; may be repeated.  [default: 24000 for paper, 39000 for trace]")  # fmt: skip
@_option("--seeds", click.IntRange(2), 12, "Draws of requests and predictions.")
@_option("--reserve-share", click.FloatRange(0.01, 1), 0.5, "Share of the KV for requests that are not running yet.")
@_option("--workers", click.IntRange(1), 2, "Number of processes.")
@as_json
def main(
    trace: str | None, workload: tuple[str, ...], requests: int, rate: float, kv_tokens: tuple[int, ...], seeds: int,
    reserve_share: float, workers: int, as_json: bool,
) -> None:  # fmt: skip
    """Compare admission policies where KV memory is scarce. Only the object "run" differs between two runs."""
    started, points = perf_counter(), []
    if "trace" in workload and not trace:
        raise click.UsageError("--workload trace needs --trace FILE")
    try:
        notes = _first(trace, requests) if trace else []
        with get_context("spawn").Pool(workers, _share, (_traces,)) as pool:
            for name in workload or (("paper", "trace") if trace else ("paper",)):
                for tokens in kv_tokens or (KV_TOKENS[name],):
                    load = Load(tokens) if name == "paper" else Load(tokens, requests, trace or "", rate)
                    points.append(compare(load, seeds, reserve_share, pool.imap, progress))
                    progress(shown(points[-1]))
    except (SimError, TraceError, cost.CostError) as error:
        raise click.UsageError(str(error)) from None
    run = {"wall_s": perf_counter() - started}
    found = {"reserve_share": reserve_share, "points": points, "notes": notes, "run": run}
    give(found, "\n\n".join(map(shown, points)), as_json)


def _first(path: str, requests: int) -> list[str]:
    """Read the trace and return the notes on it. Raises TraceError and UsageError."""
    found = replayed(path)
    if found.requests < requests:
        raise click.UsageError(f"{path} has {found.requests} requests: --requests must not be larger")
    _traces[path] = [*found.arrivals]
    for note in found.notes:
        progress(f"{path}: {note}")
    return found.notes


def shown(point: dict[str, Any]) -> str:
    """Format one point as text."""
    speed = f", {point['rate']:.3g} per second" if point["trace"] else ""
    head = f"{point['workload']}: {point['requests']} requests{speed}, {point['kv_tokens']} tokens of KV"
    rows = []
    for name, row in point["systems"].items():
        times = [_ranged(row["jct_mean"], 2), _ranged(row["over_greedy"], 3), f"{row['jct_p99']:.1f}"]
        rows.append([name, *times, f"{row['preempted']:.2%}", f"{row['makespan_s']:.1f}"])
    columns = ("", "mean JCT, s", "over greedy", "p99", "preempted", "makespan")
    targets = f"targets: {json.dumps(point['targets'])}"
    return "\n".join([f"{head}, {point['seeds']} seeds", table(columns, rows), targets])


def _ranged(found: dict[str, float], digits: int) -> str:
    return f"{found['mean']:.{digits}f} [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"


if __name__ == "__main__":
    main(prog_name="bench_admission")
