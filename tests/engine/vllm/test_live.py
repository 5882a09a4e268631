"""The whole live path on the real model: broker, prefill worker, shared memory, decode worker. The same tokens as
plain vLLM in one engine, one at a time, all at once, and after the decode worker was killed."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from live import LiveCluster, wait_until
from rich.console import Console

from tetri.bench import demo
from tetri.client import AsyncClient, Result
from tetri.request import Sampling, blocks_for

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]

TOKENS = 16
ALONE = 8  # of a request that has the cluster to itself, so that each takes a step of its own


@pytest.fixture(scope="module")
def texts(reference, prompts):
    return [reference.text(prompt, TOKENS) for prompt in prompts]


def check_receipt(cluster: LiveCluster, prompt: list[int], result: Result) -> None:
    receipt, block = result.receipt, cluster.config.engine.block_tokens
    assert (receipt.prompt_tokens, receipt.adopted, receipt.recomputed) == (len(prompt), len(prompt), 0)
    assert receipt.kv_bytes == blocks_for(len(prompt), block) * 30 * 3 * 128 * block * 4
    assert (receipt.prefill_instance, receipt.decode_instance) == ("p0", "d0")


def test_one_at_a_time(cluster, prompts, texts) -> None:
    client = cluster.client(timeout=120)
    for prompt, text in zip(prompts, texts, strict=True):
        result = client.generate(prompt, max_tokens=ALONE, ignore_eos=True)
        assert result.token_ids == text.ids[:ALONE]
        assert result.receipt.chunks == -(-len(prompt) // cluster.config.engine.chunk_tokens)
        check_receipt(cluster, prompt, result)


def test_all_at_once(cluster, prompts, texts) -> None:
    results = cluster.answers(prompts, max_tokens=TOKENS, ignore_eos=True)
    for prompt, text, result in zip(prompts, texts, results, strict=True):
        check_receipt(cluster, prompt, result)
        assert text.agrees(result.token_ids), f"prompt of {len(prompt)} tokens"
    assert sum(result.token_ids == text.ids for text, result in zip(texts, results, strict=True)) >= 39


def test_the_demos_prompts(cluster, monkeypatch) -> None:
    monkeypatch.setattr(demo, "running", lambda *_: contextlib.nullcontext())
    assert demo.demonstrate(cluster.config, Console()) == 0


def test_kill_9_of_the_decode_worker(cluster, prompts, reference) -> None:
    """The stream goes on with no token lost, repeated or changed, for greedy and for drawn text: on the instance that
    is left, which does both from here on."""
    prompt = next(prompt for prompt in prompts if len(prompt) == 640)
    samplings = [
        {"max_tokens": 90, "ignore_eos": True},
        {"max_tokens": 90, "ignore_eos": True, "temperature": 0.8, "seed": 3},
    ]
    texts = [reference.generate(prompt, Sampling(**s)) for s in samplings]

    async def run() -> list[Result]:
        async with AsyncClient(cluster.config.clients_address, timeout=240) as client:
            tasks = [asyncio.create_task(client.generate(prompt, **sampling)) for sampling in samplings]

            def both_run() -> bool:
                return cluster.instances()["d0"]["load"]["running"] == len(tasks)

            await asyncio.to_thread(wait_until, both_run, "they do not run")
            cluster.kill("d0")
            return await asyncio.gather(*tasks)

    for text, result in zip(texts, asyncio.run(run()), strict=True):
        assert result.token_ids == text.ids
        assert (result.receipt.attempts, result.receipt.decode_instance) == (2, "p0")
    cluster.start("d0")
    cluster.wait_ready("d0")
