"""What one routing decision costs among many decode instances, at loads where all, half, a few or none have room."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from random import Random
from time import perf_counter_ns, thread_time_ns
from typing import Any

import click

from tetri.metrics import percentile
from tetri.policy.rules import DECODE_ROUTES, Rules
from tetri.policy.views import DecodePool, Need

NEED_BLOCKS, END_BLOCKS = 32, 64  # of every request; instances with room have more, those without less


@dataclass(frozen=True)
class Case:
    """Which share of the instances has room for a request to its predicted end, and which share has room now."""

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


@click.command()
@click.option("--policy", type=click.Choice(sorted(DECODE_ROUTES)), default=Rules().decode_route, show_default=True)
@click.option("--instances", type=click.IntRange(1), default=1000, show_default=True, help="Decode instances.")
@click.option("--calls", type=click.IntRange(100), default=100_000, show_default=True, help="Decisions at each load.")
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--limit-us", type=click.FloatRange(0), help="Fail when the 99th percentile of a load is above this.")
@click.option("--json", "as_json", is_flag=True, help="One object on stdout.")
def main(policy: str, instances: int, calls: int, seed: int, limit_us: float | None, as_json: bool) -> None:
    """Time single decisions of a decode routing policy. Times are in the `run` object, all else depends on the seed."""
    loads, times = [], {}
    for case in CASES:
        nowhere, spent, worked = measure(policy, case, instances, calls, seed)
        loads.append({"case": case.name, "nowhere": nowhere})
        times[case.name] = {
            "p50_us": round(percentile(spent, 0.5) / 1000, 2),
            "p99_us": round(percentile(spent, 0.99) / 1000, 2),
            "p99_cpu_us": round(percentile(worked, 0.99) / 1000, 2),
            "max_us": round(max(spent) / 1000, 2),
        }
    said = {"policy": policy, "instances": instances, "calls": calls, "seed": seed, "loads": loads, "run": times}
    if as_json:
        print(json.dumps(said))
    else:
        report(said)
    slow = {name: took["p99_us"] for name, took in times.items() if limit_us is not None and took["p99_us"] > limit_us}
    if slow:
        name, took = max(slow.items(), key=lambda item: item[1])
        print(f"bench_route: {name}: 99th percentile {took} us, limit {limit_us:g} us", file=sys.stderr)
        sys.exit(1)


def measure(policy: str, case: Case, instances: int, calls: int, seed: int) -> tuple[int, list[int], list[int]]:
    """How many decisions found no instance, and the nanoseconds that each took and that this thread computed in it:
    beside other work on the machine they differ. Every instance that is chosen gets one request more, so that those
    with few heavy ones are not always the same."""
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
    pool = DecodePool([f"d{number}" for number in range(instances)])
    ready = rng.sample(range(instances), instances)
    for place in ready:
        now, end = place < case.now * instances, place < case.to_the_end * instances
        pool.free.append(rng.randrange(END_BLOCKS, 4 * END_BLOCKS) if now else rng.randrange(NEED_BLOCKS))
        pool.spare.append(pool.free[-1] if end or not now else rng.randrange(-END_BLOCKS, END_BLOCKS))
        pool.heavy.append(rng.randrange(16))
        pool.light.append(rng.randrange(64))
    return pool


def report(said: dict[str, Any]) -> None:
    print(f"{said['policy']} among {said['instances']} instances, {said['calls']} decisions at each load, us:")
    for load in said["loads"]:
        took = said["run"][load["case"]]
        print(
            f"  {load['case']:<26} p50 {took['p50_us']:>7.2f}   p99 {took['p99_us']:>7.2f}"
            f"   cpu p99 {took['p99_cpu_us']:>7.2f}   longest {took['max_us']:>9.2f}   nowhere {load['nowhere']}"
        )


if __name__ == "__main__":
    main(prog_name="bench_route")
