"""The real model's KV through a GPU's slab that a stand-in plays: gathered by the prefill worker, read through its
handle, scattered by the decode worker; the same tokens as plain vLLM in one engine."""

from __future__ import annotations

import os
import shutil
import tempfile

import pytest
from live import REPOSITORY, VLLM, LiveCluster

from tetri.request import blocks_for

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]
TOKENS = 12


def test_a_hand_over_through_a_slab_in_a_gpus_memory(reference, prompts):
    chosen = prompts[:12]
    right = [reference.text(prompt, TOKENS).ids for prompt in chosen]
    folder = tempfile.mkdtemp(prefix="tetri-cuda-", dir="/dev/shm")
    prologue = (
        f"import sys; sys.path[:0] = [{str(REPOSITORY)!r}, {str(REPOSITORY / 'tests' / 'engine' / 'vllm')!r}]; "
        f"from played_gpu import play; play({folder!r}); "
    )
    cpus = sorted(os.sched_getaffinity(0))
    settings = ["model.dtype=float32", "model.context=2304", "engine.kv_mib=400", "transfer.slab_blocks=24"]
    settings += [f"worker.p0.cpus={cpus[0]}", f"worker.d0.cpus={cpus[-1]}", "worker.p0.gpu=0", "worker.d0.gpu=0"]
    try:
        with LiveCluster(VLLM, settings, 240.0, prologue) as cluster:
            client = cluster.client()
            results = [client.generate(prompt, max_tokens=TOKENS, ignore_eos=True) for prompt in chosen]
            cluster.wait_idle()
            block = cluster.config.engine.block_tokens
    finally:
        shutil.rmtree(folder)
    assert [result.token_ids for result in results] == right
    for prompt, result in zip(chosen, results, strict=True):
        receipt = result.receipt
        assert (receipt.transport, receipt.adopted, receipt.recomputed) == ("cuda_ipc", len(prompt), 0)
        assert receipt.kv_bytes == blocks_for(len(prompt), block) * 30 * 3 * 128 * block * 4
