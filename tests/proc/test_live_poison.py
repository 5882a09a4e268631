"""A request that kills each live worker that computes it."""

from __future__ import annotations

import asyncio
import random
import signal
from pathlib import Path

from live import EMULATED, LiveCluster

from tetri.client import AsyncClient, RequestFailed
from tetri.config import load
from tetri.engine.emulated import reference
from tetri.proc.broker import limits
from tetri.request import Sampling

DEADLY = 31_000
SAMPLING = Sampling(max_tokens=40)
FOUR = ",".join([*(f"{{iid='p{number}', role='prefill'}}" for number in range(4)), "{iid='d0', role='decode'}"])


def test_three_workers_die_the_request_ends_with_an_error_and_its_neighbours_end_well() -> None:
    overrides = [f"worker=[{FOUR}]", f"emulated.deadly_token={DEADLY}"]
    with LiveCluster(overrides=overrides) as cluster:
        made, rng = cluster.config.emulated, random.Random(5)
        prompts = [[rng.randrange(1, DEADLY) for _ in range(rng.randint(1, 700))] for _ in range(20)]
        right = [reference(prompt, SAMPLING, made.vocabulary, made.token_bytes) for prompt in prompts]
        assert not any(DEADLY in ids for ids in right)

        async def ask() -> tuple[list[list[int]], BaseException]:
            async with AsyncClient(cluster.config.clients_address, timeout=60) as client:
                deadly = client.generate([*prompts[0], DEADLY], max_tokens=40)
                others = (client.generate(prompt, max_tokens=40) for prompt in prompts)
                first, *rest = await asyncio.gather(deadly, *others, return_exceptions=True)
                return [getattr(each, "token_ids", each) for each in rest], first

        found, error = asyncio.run(ask())
        assert found == right
        assert isinstance(error, RequestFailed) and "it kills workers: 3 of them were lost with it (p" in str(error)
        assert "\n" not in str(error)
        dead = [name for name in ("p0", "p1", "p2", "p3") if cluster.instances()[name]["state"] == "lost"]
        assert len(dead) == 3, error
        for name in dead:
            assert cluster.processes.pop(name).wait(10) == -signal.SIGKILL
            cluster.killed.append(name)
        counters = cluster.client().status()["counters"]
        assert (counters["guilty"], counters["workers_lost"], counters["ended_error"]) == (1, 3, 1)
        cluster.wait_idle()


def test_the_number_of_deaths_is_a_setting() -> None:
    assert [limits(load(Path(EMULATED), more)).max_deaths for more in ([], ["broker.max_deaths=9"])] == [3, 9]
