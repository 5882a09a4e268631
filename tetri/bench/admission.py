"""bench_admission: compare decode admission policies where KV memory is scarce: mean JCT and preemptions by policy.

Simulates the live cores with one decode instance and enough prefill instances that only the decode instance limits.
Two workloads: `paper` is 256 requests of the paper's Mixed that arrive together, as in Figure 18; `trace` is a window
of a file of real arrivals (--trace), a different one for each seed.

Memory counts as scarce if greedy admission preempts at least --binds of the requests. The program searches for that
point: for `paper` the largest KV capacity, for `trace` the lowest request rate at the capacity of the cost table.
--scale repeats the comparison at multiples of these capacities; for `trace` the rate is searched again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from random import Random
from statistics import fmean
from time import perf_counter
from typing import Any, TypeVar

import click

from tetri import cost
from tetri.bench.report import Progress, as_json, give, interval, progress, table
from tetri.metrics import percentile
from tetri.policy.rules import Rules
from tetri.sim import workloads
from tetri.sim.setup import Setup, SimError
from tetri.sim.traces import Arrival, TraceError, replayed
from tetri.sim.world import World

COST = "v100-opt13b"
CLOSED = 256  # requests of Figure 18
FEEDERS = {"paper": 8, "trace": 2}  # prefill instances
GRID, TRIES = 2**0.25, 24  # factor between two capacities or rates of the search; number of tries
SLOWEST = 0.9  # the first rate of the trace, in requests per second
#: The reserve policies use the low end of the range, as in the paper; peak uses the high end. Ideal: exact lengths.
SYSTEMS = {
    "greedy": Rules(order="sjf", admit="greedy", length="noisy"),
    "reserve_static": Rules(order="sjf", admit="reserve_static", length="noisy", admit_end="low"),
    "reserve_dynamic": Rules(order="sjf", admit="reserve_dynamic", length="noisy", admit_end="low"),
    "peak": Rules(order="sjf", admit="peak", length="noisy", admit_end="high"),
    "reserve_static ideal": Rules(order="sjf", admit="reserve_static", length="oracle"),
    "reserve_dynamic ideal": Rules(order="sjf", admit="reserve_dynamic", length="oracle"),
    "peak ideal": Rules(order="sjf", admit="peak", length="oracle"),
}
RIVALS = ("greedy", "reserve_dynamic")
RATIO_LIMIT = 1.02  # the largest ratio of peak's mean JCT to the better rival's


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


@cache
def _trace(path: str) -> list[Arrival]:
    return list(replayed(path))


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


def binding(loads: Iterable[Load], seeds: int, least: float, share: float, mapped: Mapped, progress: Progress) -> Load:
    """Return the first load at which greedy admission preempts a share `least`. Raises SimError if there is none."""
    for load in loads:
        runs = mapped(_one, [(load, share, SYSTEMS["greedy"], seed) for seed in range(seeds)])
        preempted = fmean(each.preempted for each in runs)
        progress(
            f"{load.name}, {load.kv_tokens} tokens of KV, {load.rate:.3g} per second: greedy preempts {preempted:.1%}"
        )
        if preempted >= least:
            return load
    raise SimError(f"greedy admission never preempts {least:.0%} of the requests")


def compare(load: Load, seeds: int, share: float, mapped: Mapped, progress: Progress) -> dict[str, Any]:
    """Compare all systems with the same requests and predictions."""
    prefill_requests = [(load, share, rules, seed) for rules in SYSTEMS.values() for seed in range(seeds)]
    runs: list[Run] = []
    for made in mapped(_one, prefill_requests):
        runs.append(made)
        if len(runs) % seeds == 0:
            progress(f"{load.name}, {load.kv_tokens} tokens of KV: {len(runs) // seeds} of {len(SYSTEMS)} policies")
    by_name = {name: runs[place * seeds : (place + 1) * seeds] for place, name in enumerate(SYSTEMS)}
    rows = {name: _row(mine, {rival: by_name[rival] for rival in RIVALS}) for name, mine in by_name.items()}
    settings = {**asdict(load), "trace": Path(load.trace).name}
    return {"workload": load.name, **settings, "seeds": seeds, "systems": rows, "targets": targets(rows)}


def _row(runs: Sequence[Run], rivals: dict[str, list[Run]]) -> dict[str, Any]:
    jct = [each.jct_mean for each in runs]
    return {
        "jct_mean": interval(jct),
        "jct_p99": fmean(each.jct_p99 for each in runs),
        "preempted": fmean(each.preempted for each in runs),
        "makespan_s": fmean(each.makespan_s for each in runs),
        "jct_over": {  # paired: both have the same requests and predictions
            name: interval([mine / other.jct_mean for mine, other in zip(jct, others, strict=True)])
            for name, others in rivals.items()
        },
    }


def targets(rows: dict[str, Any]) -> dict[str, Any]:
    """Return whether `peak` meets its targets against greedy and reserve-dynamic."""
    mine, others = rows["peak"], [rows[name] for name in RIVALS]
    best = min(other["jct_mean"]["mean"] for other in others)
    apart = any(mine["jct_mean"]["high"] < other["jct_mean"]["low"] for other in others)
    ratio = mine["jct_mean"]["mean"] / best
    return {
        "ratio": ratio,  # to the better rival
        "limit": RATIO_LIMIT,
        "separate_intervals": apart,
        "preempted": mine["preempted"],
        "memory_binds": rows["greedy"]["preempted"] >= 0.05,
        "ok": ratio <= RATIO_LIMIT and apart and mine["preempted"] <= 0.01,
    }


def loads_for(workload: str, scale: float, found: Load | None, trace: str, requests: int) -> Iterable[Load]:
    """Return the loads to search at this scale, ordered from ample to scarce memory."""
    table = cost.load(COST).kv_tokens
    if workload == "trace":
        return [Load(int(table * scale), requests, trace, SLOWEST * GRID**step) for step in range(TRIES)]
    if found is not None:
        return [replace(found, kv_tokens=int(found.kv_tokens * scale))]
    return [Load(int(2 * table / GRID**step)) for step in range(TRIES) if table / GRID**step > 2048]


def points(
    names: Sequence[str], trace: str, requests: int, scales: Sequence[float], seeds: int, probes: int, least: float,
    share: float, mapped: Mapped, progress: Progress,
) -> list[dict[str, Any]]:  # fmt: skip
    """Compare the systems for each workload and scale."""
    search = partial(binding, seeds=probes, share=share, mapped=mapped, progress=progress)
    made = []
    for workload in names:
        found = search(loads_for(workload, 1.0, None, trace, requests), least=least) if workload == "paper" else None
        for scale in scales:
            at_any = 0.0 if workload == "paper" else least
            load = search(loads_for(workload, scale, found, trace, requests), least=at_any)
            made.append({"scale": scale, **compare(load, seeds, share, mapped, progress)})
            progress(shown(made[-1]))
    return made


# ---------------------------------------------------------------- the program


def _option(name: str, kind: Any, default: Any, text: str, **more: Any) -> Callable[[F], F]:
    return click.option(name, type=kind, default=default, show_default=True, help=text, **more)


@click.command()
@click.option(
    "--trace", type=click.Path(exists=True, dir_okay=False), help="CSV of arrivals. Without it: only the paper's."
)
@_option("--workload", click.Choice(("paper", "trace")), ("paper", "trace"), "May be repeated.", multiple=True)
@_option("--requests", click.IntRange(10), 2000, "Requests in one window of the trace.")
@_option("--seeds", click.IntRange(2), 20, "Draws of requests and predictions.")
@_option("--probes", click.IntRange(1), 5, "Seeds of the search for the load.")
@_option("--binds", click.FloatRange(0.001, 1), 0.06, "Share that greedy preempts where memory is scarce.")
@_option("--scale", click.FloatRange(0.1, 10), (1.0,), "Multiple of the capacity; may be repeated.", multiple=True)
@_option("--reserve-share", click.FloatRange(0.01, 1), 0.5, "Share of the KV for requests that are not running yet.")
@_option("--workers", click.IntRange(1), 2, "Number of processes.")
@as_json
def main(
    trace: str | None, workload: tuple[str, ...], requests: int, seeds: int, probes: int, binds: float,
    scale: tuple[float, ...], reserve_share: float, workers: int, as_json: bool,
) -> None:  # fmt: skip
    """Compare admission policies where KV memory is scarce. Only the object "run" differs between two runs."""
    started = perf_counter()
    try:
        if trace and len(_trace(trace)) < requests:
            raise click.UsageError(f"{trace} has {len(_trace(trace))} requests: --requests must not be larger")
        with get_context("spawn").Pool(workers) as pool:
            names = [name for name in workload if name == "paper" or trace]
            made = points(names, trace or "", requests, scale, seeds, probes, binds, reserve_share, pool.imap, progress)
    except (SimError, TraceError, cost.CostError) as error:
        raise click.UsageError(str(error)) from None
    found = {"reserve_share": reserve_share, "points": made, "run": {"wall_s": perf_counter() - started}}
    give(found, "\n\n".join(map(shown, made)), as_json)


def shown(point: dict[str, Any]) -> str:
    """Format one point as text."""
    speed = f", {point['rate']:.3g} per second" if point["trace"] else ""
    head = f"{point['workload']}: {point['requests']} requests{speed}, {point['kv_tokens']} tokens of KV"
    rows = []
    for name, row in point["systems"].items():
        jct, over = row["jct_mean"], row["jct_over"]["greedy"]["mean"]
        times = [f"{jct['mean']:.2f}", f"{jct['low']:.2f} - {jct['high']:.2f}", f"{over:.3f}", f"{row['jct_p99']:.1f}"]
        rows.append([name, *times, f"{row['preempted']:.2%}", f"{row['makespan_s']:.1f}"])
    columns = ("", "mean JCT, s", "95 %", "over greedy", "p99", "preempted", "makespan")
    targets = f"targets: {json.dumps(point['targets'])}"
    return "\n".join([f"{head}, {point['seeds']} seeds", table(columns, rows), targets])


if __name__ == "__main__":
    main(prog_name="bench_admission")
