"""tools/bench_route: what it says, and that only its times differ between two runs."""

import json
import subprocess
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from tetri.bench import routing

REPOSITORY = Path(__file__).parents[2]


def bench(*arguments):
    command = [str(REPOSITORY / "tools" / "bench_route"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_same_seed_says_the_same_but_for_times():
    first, second = (bench("--role", "fixed", "--instances", "50", "--calls", "200", "--json") for _ in range(2))
    assert first.returncode == 0, first.stderr
    said, again = json.loads(first.stdout), json.loads(second.stdout)
    run = said.pop("run")
    assert run["ok"] and again.pop("run").keys() == run.keys()
    for times in (each["us"] for each in run["loads"].values()):
        assert 0 < times["median"] <= times["p99"] <= times["worst"]
    assert said == again
    assert [load["nowhere"] for load in said["loads"]] == [0, 0, 0, 0, 200]
    assert (said["policy"], said["phase"], said["instances"], said["calls"]) == ("adaptive", "decode", 50, 200)


def test_for_people_too_and_with_a_limit():
    done = bench("--instances", "50", "--calls", "200", "--policy", "first_fit", "--limit-us", "0")
    assert done.returncode == 1 and "99th percentile" in done.stderr and "limit 0 us" in done.stderr
    head = "first_fit of the decode phase among 50 instances (auto)"
    assert done.stdout.startswith(head) and len(done.stdout.splitlines()) == 7


def test_a_route_of_the_other_phase_is_refused():
    done = bench("--phase", "prefill", "--policy", "first_fit")
    assert done.returncode == 2 and "no route of the prefill phase: least_loaded, adaptive" in done.stderr


@pytest.mark.parametrize("case", routing.CASES["prefill"], ids=lambda case: case.name)
@pytest.mark.parametrize("role", ["auto", "fixed"])
def test_the_broker_s_work_is_what_its_case_says(case, role):
    """Every decision finds an instance, in time if one is."""
    decide = routing.broker("adaptive", role, case, 100, Random(1))
    chosen = Counter(decide() for _ in range(50))
    in_time = [seconds < 1e9 * routing.LATE_S for seconds in routing.a_queue(case, 100, Random(1)).values()]
    assert None not in chosen
    assert sum(in_time) == 100 * case.best


@pytest.mark.parametrize("case", routing.CASES["decode"], ids=lambda case: case.name)
def test_a_pool_is_what_its_case_says(case):
    pool = routing.a_pool(case, 1000, Random(1))
    assert len(pool.iids) == len(pool.heavy) == len(pool.light) == 1000
    assert sum(spare >= routing.END_BLOCKS for spare in pool.spare) == 1000 * case.best
    assert sum(free >= routing.NEED_BLOCKS for free in pool.free) == 1000 * case.able
    assert all(spare <= free for spare, free in zip(pool.spare, pool.free, strict=True))
