"""The whole live path on `cuda_ipc`: real processes, whose KV goes through slabs in the memory of GPUs that a stand-in
plays, which checks every call. Tokens are verified, so KV that is lost or mixed up shows."""

from __future__ import annotations

import asyncio
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from live import REPOSITORY, LiveCluster, wait_until

from tests.kv.cuda.gpus import machine
from tetri.client import AsyncClient, Result
from tetri.engine.emulated import reference
from tetri.request import Sampling

CONF = ["transfer.slab_blocks=96", "engine.block_tokens=16", "emulated.token_bytes=256"]


def cluster_on(folder: Path | None, *overrides: str, gpus: int = 1) -> LiveCluster:
    """On a stand-in in `folder`, or without one."""
    if folder is None:
        return LiveCluster(overrides=[*CONF, *overrides])
    prologue = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); from tests.kv.cuda.stand_in import install; "
        f"install({str(folder)!r}, devices={gpus}); "
    )
    return LiveCluster(overrides=[*CONF, *overrides], prologue=prologue)


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory, as a GPU's memory is no disk."""
    made = Path(tempfile.mkdtemp(prefix="tetri-cuda-", dir="/dev/shm"))
    yield made
    shutil.rmtree(made)


def run_requests(cluster: LiveCluster, count: int, seed: int) -> set[str]:
    """All at once, each checked against the reference; the transports of their receipts."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(2, 200) for _ in range(rng.randint(1, 1500))] for _ in range(count)]
    made = cluster.config.emulated

    async def everybody() -> list[Result]:
        async with AsyncClient(cluster.config.clients_address) as client:
            return await asyncio.gather(*(client.generate(prompt, max_tokens=12) for prompt in prompts))

    results = asyncio.run(everybody())
    for prompt, result in zip(prompts, results, strict=True):
        expected = reference(prompt, Sampling(max_tokens=12), made.vocabulary, made.token_bytes)
        assert result.token_ids == expected
        assert (result.receipt.adopted, result.receipt.recomputed) == (len(prompt), 0) or len(expected) == 1
    return {result.receipt.transport for result in results if len(result.token_ids) > 1}


def all_on(gpu: int) -> list[str]:
    return [f"worker.{iid}.gpu={gpu}" for iid in ("p0", "p1", "d0", "d1")]


def test_four_workers_on_one_gpu_and_two_of_them_die(folder: Path) -> None:
    with cluster_on(folder, *all_on(0)) as cluster:
        assert run_requests(cluster, 40, seed=1) == {"cuda_ipc"}
        for iid in ("p0", "d1"):
            cluster.kill(iid)
            cluster.start(iid)
            cluster.wait_ready(iid)
        assert run_requests(cluster, 40, seed=2) == {"cuda_ipc"}
        cluster.wait_idle()


def test_gpus_that_do_not_reach_each_other_are_never_paired_and_status_says_why(folder: Path) -> None:
    gpus = ["worker.p0.gpu=0", "worker.p1.gpu=1", "worker.d0.gpu=0", "worker.d1.gpu=0"]
    with cluster_on(folder, *gpus, gpus=2) as cluster:
        wait_until(lambda: "peer access" in str(cluster.instances()), "status does not say why")
        assert run_requests(cluster, 10, seed=4) == {"cuda_ipc"}
        cluster.wait_idle()


@pytest.mark.gpu
def test_four_workers_on_the_first_gpu_of_this_machine(folder: Path) -> None:
    made = machine()
    with cluster_on(Path(made.stand_in) if made.stand_in else None, *all_on(0)) as cluster:
        assert run_requests(cluster, 40, seed=1) == {"cuda_ipc"}
        cluster.kill("d1")
        cluster.start("d1")
        cluster.wait_ready("d1")
        assert run_requests(cluster, 40, seed=2) == {"cuda_ipc"}
        cluster.wait_idle()
