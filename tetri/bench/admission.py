"""Decode admission where memory binds: which policy ends requests soonest, and how many it preempts.

The live cores in the simulator: prefill instances enough that only the decode instance limits, and one of that. Two
workloads. `paper`: 256 requests of the paper's Mixed, all at once, as in its Figure 18. `trace`: a window of a file of
real arrivals (--trace), another one with each seed.

Memory binds where greedy admission preempts at least --binds of the requests. What is searched for it: for the closed
batch the largest KV capacity, for the trace the lowest rate, at the capacity of the cost table. --scale repeats that
at other capacities: the closed batch with so many times that capacity, the trace with so many times the table's and
the rate that binds there.
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
GRID, TRIES = 2**0.25, 24  # from one capacity, or rate, that is tried to the next; how many are
SLOWEST = 0.9  # requests a second of the trace that are tried first
#: The reserve policies as in the paper, with the low end of the range; peak with the high one. Ideal: the very length.
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
RATIO_LIMIT = 1.02  # of peak's mean JCT to the better rival's


@dataclass(frozen=True, slots=True)
class Load:
    """What a decode instance with `kv_tokens` is given. A `trace` is a file, of which `requests` in a row are taken,
    the times between them all stretched alike, so that `rate` average ones come a second: one that takes twice as
    much `occupancy` as the trace's mean counts twice. None: the closed batch."""

    kv_tokens: int
    requests: int = CLOSED
    trace: str = ""
    rate: float = 0.0

    @property
    def name(self) -> str:
        return "trace" if self.trace else "paper"


@dataclass(frozen=True, slots=True)
class Run:
    """`preempted`: share of the requests that were preempted at least once."""

    jct_mean: float
    jct_p99: float
    preempted: float
    makespan_s: float


def arrivals_of(load: Load, seed: int) -> tuple[list[Arrival], int]:
    """The requests, and the longest context that any may have."""
    if not load.trace:
        mixed = _paper().workloads["Mixed"]
        return mixed.draw(seed, load.requests), mixed.context
    whole = _trace(load.trace)
    first = Random(f"window {seed}").randrange(len(whole) - load.requests + 1)
    window = whole[first : first + load.requests]
    start, lasts = window[0].at_s, window[-1].at_s - window[0].at_s
    if lasts <= 0:
        raise TraceError(f"{load.requests} requests of {load.trace} come at the same time: take more")
    heavier = fmean(map(occupancy, window)) / fmean(map(occupancy, whole))
    stretch = (load.requests - 1) * heavier / load.rate / lasts
    longest = max(each.prompt + each.output for each in whole)
    return [Arrival((each.at_s - start) * stretch, each.prompt, each.output) for each in window], longest


def occupancy(arrival: Arrival) -> float:
    """What it takes of a decode instance's memory: tokens of KV x steps for which it has them."""
    return arrival.output * (arrival.prompt + arrival.output / 2)


@cache
def _paper() -> workloads.Evaluation:
    return workloads.load()


@cache
def _trace(path: str) -> list[Arrival]:
    return list(replayed(path))


def run(load: Load, reserve_share: float, rules: Rules, seed: int) -> Run:
    """Raises SimError or TraceError."""
    arrivals, context = arrivals_of(load, seed)
    setup = Setup(
        cost=replace(cost.load(COST), predictor_s=0.0, predictor_token_s=0.0),  # predictions are free
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
    """The first of `loads` at which greedy admission preempts so many. Raises SimError when none does."""
    for load in loads:
        runs = mapped(_one, [(load, share, SYSTEMS["greedy"], seed) for seed in range(seeds)])
        preempted = fmean(each.preempted for each in runs)
        progress(
            f"{load.name}, {load.kv_tokens} tokens of KV, {load.rate:.3g} a second: greedy preempts {preempted:.1%}"
        )
        if preempted >= least:
            return load
    raise SimError(f"greedy admission never preempts {least:.0%} of the requests")


def compare(load: Load, seeds: int, share: float, mapped: Mapped, progress: Progress) -> dict[str, Any]:
    """All systems on the same requests and predictions."""
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
        "jct_over": {  # paired: the same requests and predictions
            name: interval([mine / other.jct_mean for mine, other in zip(jct, others, strict=True)])
            for name, others in rivals.items()
        },
    }


def targets(rows: dict[str, Any]) -> dict[str, Any]:
    """What `peak` has to show against greedy and reserve-dynamic."""
    mine, others = rows["peak"], [rows[name] for name in RIVALS]
    best = min(other["jct_mean"]["mean"] for other in others)
    apart = any(mine["jct_mean"]["high"] < other["jct_mean"]["low"] for other in others)
    ratio = mine["jct_mean"]["mean"] / best
    return {
        "ratio": ratio,  # to the better of the two
        "limit": RATIO_LIMIT,
        "separate_intervals": apart,
        "preempted": mine["preempted"],
        "memory_binds": rows["greedy"]["preempted"] >= 0.05,
        "ok": ratio <= RATIO_LIMIT and apart and mine["preempted"] <= 0.01,
    }


def loads_for(workload: str, scale: float, found: Load | None, trace: str, requests: int) -> Iterable[Load]:
    """What to search at this scale, from where memory does not bind on."""
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
@click.option("--trace", type=click.Path(exists=True, dir_okay=False), help="CSV of arrivals; none: the paper's only.")
@_option("--workload", click.Choice(("paper", "trace")), ("paper", "trace"), "Which, repeatable.", multiple=True)
@_option("--requests", click.IntRange(10), 2000, "Of one window of the trace.")
@_option("--seeds", click.IntRange(2), 20, "Draws of requests, or windows, and of predictions.")
@_option("--probes", click.IntRange(1), 5, "Seeds of the search for the load.")
@_option("--binds", click.FloatRange(0.001, 1), 0.06, "Greedy preempts so many there; over all seeds it may be fewer.")
@_option("--scale", click.FloatRange(0.1, 10), (1.0,), "Times the capacity, repeatable.", multiple=True)
@_option("--reserve-share", click.FloatRange(0.01, 1), 0.5, "Share of the KV for requests that do not run yet.")
@_option("--workers", click.IntRange(1), 2, "Processes.")
@as_json
def main(
    trace: str | None, workload: tuple[str, ...], requests: int, seeds: int, probes: int, binds: float,
    scale: tuple[float, ...], reserve_share: float, workers: int, as_json: bool,
) -> None:  # fmt: skip
    """Compare admission policies where memory binds. All but the object "run" depends on the arguments only."""
    started = perf_counter()
    try:
        if trace and len(_trace(trace)) < requests:
            raise click.UsageError(f"{trace} has {len(_trace(trace))} requests: give --requests at most so many")
        with get_context("spawn").Pool(workers) as pool:
            names = [name for name in workload if name == "paper" or trace]
            made = points(names, trace or "", requests, scale, seeds, probes, binds, reserve_share, pool.imap, progress)
    except (SimError, TraceError, cost.CostError) as error:
        raise click.UsageError(str(error)) from None
    found = {"reserve_share": reserve_share, "points": made, "run": {"wall_s": perf_counter() - started}}
    give(found, "\n\n".join(map(shown, made)), as_json)


def shown(point: dict[str, Any]) -> str:
    speed = f", {point['rate']:.3g} a second" if point["trace"] else ""
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
