"""bench_route: measure the time of a decode routing decision among many instances, when all, half, a few or none have
free memory."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from random import Random
from time import perf_counter_ns, thread_time_ns
from typing import Any

import click

from tetri.bench.report import Program, as_json, give, progress, spread, table
from tetri.policy.rules import DECODE_ROUTES, Rules
from tetri.policy.views import DecodePool, Need

NEED_BLOCKS, END_BLOCKS = 32, 64  # KV blocks of every request: now, and at its predicted end


@dataclass(frozen=True)
class Case:
    """A load: the share of instances with free memory for a request up to its predicted end, and the share for now."""

    name: str
    to_the_end: float
    now: float


CASES = (
    Case("all have room", 1.0, 1.0),
    Case("half have room", 0.5, 0.5),
    Case("1 % have room", 0.01, 0.01),
    Case("none has room to the end", 0.0, 1.0),
    Case("none has room", 0.0, 0.0),
)


@click.command(cls=Program)
@click.option("--policy", type=click.Choice(sorted(DECODE_ROUTES)), default=Rules().decode_route, show_default=True)
@click.option("--instances", type=click.IntRange(1), default=1000, show_default=True, help="Decode instances.")
@click.option("--calls", type=click.IntRange(100), default=100_000, show_default=True, help="Decisions at each load.")
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--limit-us", type=click.FloatRange(0), help="Fail if the p99 of any load is above this.")
@as_json
def main(policy: str, instances: int, calls: int, seed: int, limit_us: float | None, as_json: bool) -> None:
    """Measure single decisions of a decode routing policy. Only the object "run" differs between two runs."""
    loads, times = [], {}
    for case in CASES:
        nowhere, spent, worked = measure(policy, case, instances, calls, seed)
        loads.append({"case": case.name, "nowhere": nowhere})
        times[case.name] = {"us": spread(spent, 1e-3, 2), "cpu_us": spread(worked, 1e-3, 2)}
    name, slowest = max(((name, measured["us"]["p99"]) for name, measured in times.items()), key=lambda item: item[1])
    ok = limit_us is None or slowest <= limit_us
    settings = {"policy": policy, "instances": instances, "calls": calls, "seed": seed}
    found = {**settings, "loads": loads, "limit_us": limit_us, "run": {"loads": times, "ok": ok}}
    give(found, shown(found), as_json)
    if not ok:
        progress(f"bench_route: {name}: 99th percentile {slowest} us, limit {limit_us:g} us")
        sys.exit(1)


def measure(policy: str, case: Case, instances: int, calls: int, seed: int) -> tuple[int, list[int], list[int]]:
    """Return the number of decisions without an instance, and for each decision the wall time and this thread's CPU
    time in nanoseconds. Each decision adds a request to the chosen instance, so that the choice varies."""
    rng, route = Random(seed), DECODE_ROUTES[policy]
    pool = a_pool(case, instances, rng)
    needs = [Need(NEED_BLOCKS, END_BLOCKS, heavy) for heavy in (False, True)]
    nowhere, spent, worked = 0, [], []
    for _ in range(calls):
        need = needs[rng.random() < 0.5]
        began, start = thread_time_ns(), perf_counter_ns()
        column = route(need, pool, rng)
        spent.append(perf_counter_ns() - start)
        worked.append(thread_time_ns() - began)
        if column is None:
            nowhere += 1
            continue
        pool.last = column
        (pool.heavy if need.heavy else pool.light)[column] += 1
    return nowhere, spent, worked


def a_pool(case: Case, instances: int, rng: Random) -> DecodePool:
    """Return a random pool of decode instances for this load."""
    pool = DecodePool([f"d{number}" for number in range(instances)])
    ready = rng.sample(range(instances), instances)
    for place in ready:
        now, end = place < case.now * instances, place < case.to_the_end * instances
        pool.free.append(rng.randrange(END_BLOCKS, 4 * END_BLOCKS) if now else rng.randrange(NEED_BLOCKS))
        pool.spare.append(pool.free[-1] if end or not now else rng.randrange(-END_BLOCKS, END_BLOCKS))
        pool.heavy.append(rng.randrange(16))
        pool.light.append(rng.randrange(64))
    return pool


def shown(found: dict[str, Any]) -> str:
    """Format the results as text."""
    rows = []
    for load in found["loads"]:
        measured = found["run"]["loads"][load["case"]]
        times = [measured["us"]["median"], measured["us"]["p99"], measured["cpu_us"]["p99"], measured["us"]["worst"]]
        rows.append([load["case"], *(f"{time:.2f}" for time in times), str(load["nowhere"])])
    head = f"{found['policy']} among {found['instances']} instances, {found['calls']} decisions at each load, us:"
    return f"{head}\n{table(('', 'median', 'p99', 'cpu p99', 'worst', 'nowhere'), rows)}"


if __name__ == "__main__":
    main(prog_name="bench_route")
