"""A request that kills each live worker that computes it: at once, with the worker's last messages."""

from __future__ import annotations

import asyncio
import random
import signal
from pathlib import Path

import pytest
from live import EMULATED, LiveCluster

from tetri.client import AsyncClient, RequestFailed
from tetri.config import load
from tetri.engine.emulated import reference
from tetri.proc.broker import limits
from tetri.request import Sampling

DEADLY, TOKENS = 31_000, 40
RNG = random.Random(5)
PROMPTS = [[RNG.randrange(1, DEADLY) for _ in range(RNG.randint(1, 700))] for _ in range(20)]
MADE = load(Path(EMULATED)).emulated


def right(prompt: list[int]) -> list[int]:
    return reference(prompt, Sampling(max_tokens=TOKENS), MADE.vocabulary, MADE.token_bytes)


def writer() -> tuple[list[int], int]:
    """A prompt whose first output token, which the first decode step computes, is in no other prompt or output. Later
    tokens may be lost with their worker, all of them: these steps take no time."""
    while True:
        prompt = [RNG.randrange(1, DEADLY) for _ in range(300)]
        token = right(prompt)[0]
        if token not in prompt and not any(token in ids + right(ids) for ids in PROMPTS):
            return prompt, token


@pytest.mark.parametrize("where", ["prompt", "output"])
def test_three_workers_die_the_request_ends_with_an_error_and_its_neighbours_end_well(where: str) -> None:
    poison, deadly = ([*PROMPTS[0], DEADLY], DEADLY) if where == "prompt" else writer()
    roles = ("prefill",) * 4 + ("decode",) * (4 if where == "output" else 1)  # one of each is left
    workers = ",".join(f"{{iid='w{number}', role='{role}'}}" for number, role in enumerate(roles))
    assert not any(deadly in prompt + right(prompt) for prompt in PROMPTS)

    async def ask(address: str) -> list[object]:
        async with AsyncClient(address, timeout=60) as client:
            answers = (client.generate(prompt, max_tokens=TOKENS) for prompt in (poison, *PROMPTS))
            return await asyncio.gather(*answers, return_exceptions=True)

    with LiveCluster(overrides=[f"worker=[{workers}]", f"emulated.deadly_token={deadly}"]) as cluster:
        error, *others = asyncio.run(ask(cluster.config.clients_address))
        assert [getattr(each, "token_ids", each) for each in others] == list(map(right, PROMPTS))
        assert isinstance(error, RequestFailed) and "it kills workers: 3 of them were lost with it (w" in str(error)
        assert "\n" not in str(error) and "while it computed this request alone" in str(error)
        dead = [iid for iid, instance in cluster.instances().items() if instance["state"] == "lost"]
        assert len(dead) == 3, (dead, error)
        for name in dead:
            assert cluster.processes.pop(name).wait(10) == -signal.SIGKILL
            cluster.killed.append(name)
        counters = cluster.client().status()["counters"]
        assert (counters["guilty"], counters["workers_lost"], counters["ended_error"]) == (1, 3, 1)
        cluster.wait_idle()


def test_the_number_of_deaths_is_a_setting() -> None:
    assert [limits(load(EMULATED, more)).max_deaths for more in ([], ["broker.max_deaths=9"])] == [3, 9]
