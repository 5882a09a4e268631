"""bench_route: measure the time of a routing decision among many instances: of a dispatcher, when all, half, a few or
none have free memory; of the broker, when all, half, a few or none would compute the prompt in time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from time import perf_counter_ns, thread_time_ns
from typing import Any

import click

from tetri.bench.report import Program, as_json, give, progress, spread, table
from tetri.core.broker.membership import Members
from tetri.instance import Capacity, Fingerprint, Instance, Reach
from tetri.policy.rules import DECODE_ROUTES, PREFILL_ROUTES, Rules
from tetri.policy.views import DecodePool, Need
from tetri.wire.load import Load
from tetri.wire.messages import ClusterView, InstanceLoad, Ready

NEED_BLOCKS, END_BLOCKS = 32, 64  # KV blocks of every request: now, and at its predicted end
PROMPT, WORK_S, TTFT_S = 512, 0.1, 1.0  # tokens of every prompt, seconds of its prefill, and its limit
QUEUED_S, LATE_S = 0.1, 10.0  # seconds of work that an instance in time has at most, and of one that is late
DECODES = 64  # of an adaptive instance, at most
Decide = Callable[[], int | None]


@dataclass(frozen=True)
class Case:
    """A load: the share of instances that suit a request best, and the share that suit it at all. Dispatcher: that have
    memory up to its predicted end, and for now. Broker: that compute the prompt in time, and any."""

    name: str
    best: float
    able: float


CASES = {
    "decode": (
        Case("all have room", 1.0, 1.0),
        Case("half have room", 0.5, 0.5),
        Case("1 % have room", 0.01, 0.01),
        Case("none has room to the end", 0.0, 1.0),
        Case("none has room", 0.0, 0.0),
    ),
    "prefill": (
        Case("all are in time", 1.0, 1.0),
        Case("half are in time", 0.5, 1.0),
        Case("1 % are in time", 0.01, 1.0),
        Case("none is in time", 0.0, 1.0),
    ),
}
ROUTES: dict[str, Mapping[str, Any]] = {"decode": DECODE_ROUTES, "prefill": PREFILL_ROUTES}
DEFAULTS = {"decode": Rules().decode_route, "prefill": Rules().prefill_route}


@click.command(cls=Program)
@click.option(
    "--phase", type=click.Choice(sorted(CASES)), default="decode", show_default=True,
    help="decode: the decision of a dispatcher. prefill: that of the broker, its account of the work included.",
)  # fmt: skip
@click.option("--policy", help="Default: the one that tetri uses.")
@click.option(
    "--role", type=click.Choice(["fixed", "auto"]), default="auto", show_default=True, help="Role of the instances."
)
@click.option("--instances", type=click.IntRange(1), default=1000, show_default=True, help="Instances to choose from.")
@click.option("--calls", type=click.IntRange(100), default=100_000, show_default=True, help="Decisions at each load.")
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--limit-us", type=click.FloatRange(0), help="Fail if the p99 of any load is above this.")
@as_json
def main(
    phase: str, policy: str | None, role: str, instances: int, calls: int, seed: int, limit_us: float | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Measure single decisions of a routing policy. Only the object "run" differs between two runs."""
    policy = policy or DEFAULTS[phase]
    if policy not in ROUTES[phase]:
        raise click.BadParameter(f"no route of the {phase} phase: {', '.join(ROUTES[phase])}", param_hint="--policy")
    loads, times = [], {}
    for case in CASES[phase]:
        nowhere, spent, worked = measure(phase, policy, role, case, instances, calls, seed)
        loads.append({"case": case.name, "nowhere": nowhere})
        times[case.name] = {"us": spread(spent, 1e-3, 2), "cpu_us": spread(worked, 1e-3, 2)}
    name, slowest = max(((name, measured["us"]["p99"]) for name, measured in times.items()), key=lambda item: item[1])
    ok = limit_us is None or slowest <= limit_us
    settings = {"phase": phase, "policy": policy, "role": role, "instances": instances, "calls": calls, "seed": seed}
    found = {**settings, "loads": loads, "limit_us": limit_us, "run": {"loads": times, "ok": ok}}
    give(found, shown(found), as_json)
    if not ok:
        progress(f"bench_route: {name}: 99th percentile {slowest} us, limit {limit_us:g} us")
        sys.exit(1)


def measure(
    phase: str, policy: str, role: str, case: Case, instances: int, calls: int, seed: int
) -> tuple[int, list[int], list[int]]:
    """Return the number of decisions without an instance, and for each decision the wall time and this thread's CPU
    time in nanoseconds. Each decision adds a request to the chosen instance, so that the choice varies."""
    rng = Random(seed)
    decide = (dispatcher if phase == "decode" else broker)(policy, role, case, instances, rng)
    nowhere, spent, worked = 0, [], []
    for _ in range(calls):
        began, start = thread_time_ns(), perf_counter_ns()
        chosen = decide()
        spent.append(perf_counter_ns() - start)
        worked.append(thread_time_ns() - began)
        nowhere += chosen is None
    return nowhere, spent, worked


def dispatcher(policy: str, role: str, case: Case, instances: int, rng: Random) -> Decide:
    """Return what decides once where a request decodes. An adaptive instance has memory itself only if all have."""
    route, pool = DECODE_ROUTES[policy], a_pool(case, instances, rng)
    if role == "auto":
        pool.home = 0
        pool.free[0] = END_BLOCKS if case.best == 1.0 else 0
    needs = [Need(NEED_BLOCKS, END_BLOCKS, heavy) for heavy in (False, True)]

    def decide() -> int | None:
        need = needs[rng.random() < 0.5]
        column = route(need, pool, rng)
        if column is not None:
            pool.last = column
            (pool.heavy if need.heavy else pool.light)[column] += 1
        return column

    return decide


def a_pool(case: Case, instances: int, rng: Random) -> DecodePool:
    """Return a random pool of decode instances for this load."""
    pool = DecodePool([f"d{number}" for number in range(instances)])
    ready = rng.sample(range(instances), instances)
    for place in ready:
        now, end = place < case.able * instances, place < case.best * instances
        pool.free.append(rng.randrange(END_BLOCKS, 4 * END_BLOCKS) if now else rng.randrange(NEED_BLOCKS))
        pool.spare.append(pool.free[-1] if end or not now else rng.randrange(-END_BLOCKS, END_BLOCKS))
        pool.heavy.append(rng.randrange(16))
        pool.light.append(rng.randrange(64))
        pool.step_s.append(rng.random())
    return pool


@dataclass
class Assigned:
    """Nanoseconds of work and open requests, by instance."""

    work_ns: dict[str, int]
    held: dict[str, list[int]]

    def held_by(self, iid: str) -> list[int]:
        """The open requests of an instance."""
        return self.held[iid]


def broker(policy: str, role: str, case: Case, instances: int, rng: Random) -> Decide:
    """Return what decides once where a prompt is computed, and counts its work there and that of an earlier one no
    more."""
    route, members = PREFILL_ROUTES[policy], some_members(role, instances, rng)
    assigned = Assigned(a_queue(case, instances, rng), {iid: [0] * rng.randrange(DECODES) for iid in members.by_iid})
    before = list[str]()

    def count(iid: str, seconds: float) -> None:
        assigned.work_ns[iid] += round(1e9 * seconds)
        if seconds > 0:
            assigned.held[iid].append(0)
        else:
            assigned.held[iid].pop()
        members.recount(iid)

    def decide() -> int | None:
        pool = members.pool(PROMPT, assigned)
        pool.ttft_s = TTFT_S
        column = route(WORK_S, pool, rng)
        if column is not None:
            pool.last = column
            count(pool.iids[column], WORK_S)
            before.append(pool.iids[column])
            if len(before) > 1:
                count(before.pop(0), -WORK_S)
        return column

    return decide


def some_members(role: str, instances: int, rng: Random) -> Members:
    """Return the broker's members: all connected, and if they are adaptive, each with decodes and a share of its time
    for prefill."""
    members = Members(1)
    size = Capacity(blocks=4096, block_tokens=16, chunk_tokens=512, max_batch=256, context=32_768)
    kind = Fingerprint("emulated", "1", "any", "m", "w", "u8", "u8", 16, 32, 1, 1, 8)
    for number in range(instances):
        iid = f"i{number}"
        made = Instance(
            iid,
            1,
            role if role == "auto" else "prefill",
            f"ipc:///{iid}",
            kind,
            size,
            Reach(["shm"], "h", number, f"s{number}"),
        )
        members.ready(Ready(instance=made, load=Load(free_blocks=size.blocks)), 0.0)
        members.connected(iid)
    loads = [InstanceLoad(iid=iid, incarnation=1, role=role, age_s=0.0, load=_a_load(rng)) for iid in members.by_iid]
    members.viewed(ClusterView(epoch=1, number=1, loads=loads))
    return members


def _a_load(rng: Random) -> Load:
    return Load(free_blocks=0, share=rng.uniform(0.6, 1.0))


def a_queue(case: Case, instances: int, rng: Random) -> dict[str, int]:
    """Return the nanoseconds of work that are assigned to each instance."""
    ready = rng.sample(range(instances), instances)
    least_s = (LATE_S if place >= case.best * instances else 0.0 for place in ready)
    return {f"i{number}": round(1e9 * (late + rng.uniform(0, QUEUED_S))) for number, late in enumerate(least_s)}


def shown(found: dict[str, Any]) -> str:
    """Format the results as text."""
    rows = []
    for load in found["loads"]:
        measured = found["run"]["loads"][load["case"]]
        times = [measured["us"]["median"], measured["us"]["p99"], measured["cpu_us"]["p99"], measured["us"]["worst"]]
        rows.append([load["case"], *(f"{time:.2f}" for time in times), str(load["nowhere"])])
    head = (
        f"{found['policy']} of the {found['phase']} phase among {found['instances']} instances ({found['role']}), "
        f"{found['calls']} decisions at each load, us:"
    )
    return f"{head}\n{table(('', 'median', 'p99', 'cpu p99', 'worst', 'nowhere'), rows)}"


if __name__ == "__main__":
    main(prog_name="bench_route")
