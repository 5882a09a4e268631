"""tools/bench_route: what it says, and that only its times differ between two runs."""

import json
import subprocess
from pathlib import Path
from random import Random

import pytest

from tetri.bench import routing

REPOSITORY = Path(__file__).parents[2]


def bench(*arguments):
    command = [str(REPOSITORY / "tools" / "bench_route"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_same_seed_says_the_same_but_for_times():
    first, second = (bench("--instances", "50", "--calls", "200", "--json") for _ in range(2))
    assert first.returncode == 0, first.stderr
    said, again = json.loads(first.stdout), json.loads(second.stdout)
    run = said.pop("run")
    assert run["ok"] and again.pop("run").keys() == run.keys()
    for times in (each["us"] for each in run["loads"].values()):
        assert 0 < times["median"] <= times["p99"] <= times["worst"]
    assert said == again
    assert [load["nowhere"] for load in said["loads"]] == [0, 0, 0, 0, 200]
    assert (said["policy"], said["instances"], said["calls"]) == ("power_of_two", 50, 200)


def test_for_people_too_and_with_a_limit():
    done = bench("--instances", "50", "--calls", "200", "--policy", "first_fit", "--limit-us", "0")
    assert done.returncode == 1 and "99th percentile" in done.stderr and "limit 0 us" in done.stderr
    assert done.stdout.startswith("first_fit among 50 instances") and len(done.stdout.splitlines()) == 7


@pytest.mark.parametrize("case", routing.CASES, ids=lambda case: case.name)
def test_a_pool_is_what_its_case_says(case):
    pool = routing.a_pool(case, 1000, Random(1))
    assert len(pool.iids) == len(pool.heavy) == len(pool.light) == 1000
    assert sum(spare >= routing.END_BLOCKS for spare in pool.spare) == 1000 * case.to_the_end
    assert sum(free >= routing.NEED_BLOCKS for free in pool.free) == 1000 * case.now
    assert all(spare <= free for spare, free in zip(pool.spare, pool.free, strict=True))
