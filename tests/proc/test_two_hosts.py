"""Prefill on one host, decode on the other: KV over `stream`, encrypted, through a relay that delays, throttles and
cuts. Tokens are those of one engine. Two network namespaces are the two hosts; needs root and iproute2."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from live import EMULATED, PATIENCE_S
from two_hosts import TwoHostCluster, TwoHosts

from tetri.client import AsyncClient, Result
from tetri.engine.emulated import reference
from tetri.request import Sampling

MB = 1_000_000
PAIR = "worker=[{iid='p0',role='prefill'},{iid='d0',role='decode'}]"
CONF = [PAIR, "emulated.token_bytes=1024", "emulated.blocks=2048", "transfer.slab_blocks=128"]
PROMPTS = [[seed] * (40 + 131 * seed % 1900) for seed in range(32)]


@pytest.fixture(scope="module")
def hosts() -> Iterator[TwoHosts]:
    with TwoHosts() as hosts:
        yield hosts


def all_at_once(cluster: TwoHostCluster) -> list[Result]:
    async def run() -> list[Result]:
        async with AsyncClient(cluster.config.clients_address, timeout=60) as client:
            return await asyncio.gather(*(client.generate(prompt, max_tokens=12) for prompt in PROMPTS))

    return asyncio.run(run())


def check(cluster: TwoHostCluster, results: list[Result]) -> int:
    """Tokens of one engine, every prompt token's KV moved; the bytes that moved."""
    made, sampling = cluster.config.emulated, Sampling(max_tokens=12)
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert result.token_ids == reference(prompt, sampling, made.vocabulary, made.token_bytes)
        receipt = result.receipt
        assert (receipt.transport, receipt.adopted, receipt.recomputed) == ("stream", len(prompt), 0)
        assert (receipt.prefill_instance, receipt.decode_instance) == ("p0", "d0")
    return sum(result.receipt.kv_bytes for result in results)


def test_many_requests_through_a_network_that_delays_throttles_and_cuts(hosts: TwoHosts) -> None:
    weather = ["--delay", "0.001", "--rate", str(100 * MB), "--cut-every", str(4 * MB)]
    with TwoHostCluster(hosts, EMULATED, CONF, weather, PATIENCE_S) as cluster:
        moved = check(cluster, all_at_once(cluster))
        cluster.wait_idle()
        counted = cluster.relayed()
    assert moved > 20 * MB and counted["forwarded"] >= moved, "it went another way"
    assert counted["cuts"] >= 3 and counted["connections"] > counted["cuts"]
