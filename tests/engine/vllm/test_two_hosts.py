"""The real model over two hosts (network namespaces): prefill on one, decode on the other, KV over `stream`, encrypted,
through a relay that delays and cuts. The tokens of one engine."""

from __future__ import annotations

import os

import pytest
from live import VLLM
from two_hosts import TwoHostCluster, TwoHosts

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]

TOKENS = 16
MB = 1_000_000
CONF = ["model.dtype=float32", "model.context=2304", "transfer.slab_blocks=24", "engine.kv_mib=1100"]
WEATHER = ["--delay", "0.0005", "--cut-every", str(60 * MB)]


def test_two_hosts_write_what_one_engine_writes(reference, prompts) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    pins = [f"worker.p0.cpus={cpus[0]}", f"worker.d0.cpus={cpus[-1]}"]
    some = prompts[::3]
    texts = [reference.text(prompt, TOKENS) for prompt in some]
    with TwoHosts() as hosts, TwoHostCluster(hosts, VLLM, [*CONF, *pins], WEATHER, 240.0) as cluster:
        client = cluster.client(timeout=240)
        moved = 0
        for prompt, text in zip(some, texts, strict=True):
            result = client.generate(prompt, max_tokens=TOKENS, ignore_eos=True)
            assert result.token_ids == text.ids
            receipt = result.receipt
            assert (receipt.transport, receipt.adopted, receipt.recomputed) == ("stream", len(prompt), 0)
            moved += receipt.kv_bytes
        cluster.wait_idle()
        counted = cluster.relayed()
    assert counted["forwarded"] >= moved > 100 * MB and counted["cuts"] >= 2
