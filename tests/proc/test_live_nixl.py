"""The live path over nixl: real processes that read each other's slabs one-sided, tokens verified."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from live import LiveCluster

from tetri.client import Result
from tetri.engine.emulated import reference
from tetri.request import Sampling

OVERRIDES = ("transfer.transport=nixl", "transfer.slab_blocks=128")


@pytest.fixture
def cluster() -> Iterator[LiveCluster]:
    with LiveCluster(overrides=OVERRIDES) as cluster:
        yield cluster
        cluster.wait_idle()


def check(cluster: LiveCluster, prompt: list[int], result: Result, output: int) -> None:
    made = cluster.config.emulated
    assert result.token_ids == reference(prompt, Sampling(max_tokens=output), made.vocabulary, made.token_bytes)
    receipt = result.receipt
    if receipt.decode_instance is None:  # a decode worker died before the last token, which the prefill worker wrote
        assert receipt.attempts > 1
        assert (receipt.adopted, receipt.recomputed, receipt.transport) == (0, 0, "none")
    else:
        assert (receipt.adopted, receipt.recomputed, receipt.transport) == (len(prompt), 0, "nixl")


def ask_many(cluster: LiveCluster, seed: int, count: int, victim: str = "") -> None:
    """Every answer must be right, whoever dies in the middle."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(1000) for _ in range(rng.randint(1, 3000))] for _ in range(count)]
    client = cluster.client()
    streams = [client.stream(prompt, max_tokens=9) for prompt in prompts]
    for number, (prompt, stream) in enumerate(zip(prompts, streams, strict=True)):
        check(cluster, prompt, stream.wait(), 9)
        if victim and number == count // 4:
            cluster.kill(victim)


def test_many_requests_and_workers_that_die_and_come_back(cluster: LiveCluster) -> None:
    ask_many(cluster, 1, 30)
    for victim in ("p0", "d1"):
        ask_many(cluster, 2, 40, victim)
        cluster.start(victim)
        cluster.wait_ready(victim)
        ask_many(cluster, 3, 30)
    assert not [name for name in cluster.processes if "Traceback" in cluster.log(name)]
