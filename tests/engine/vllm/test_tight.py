"""The real model with far too little memory: decodes are preempted and computed again. One worker that does both needs
several steps for that, beside chunks of prompts; what its engine does then must be what its core takes for right."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import pytest
from live import VLLM, LiveCluster, wait_until
from plain import Text

from tetri.client import AsyncClient, Result
from tetri.engine_request import StepDone
from tetri.proc.recorder import read, value

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]

TOKENS = 20
KV_MIB = 74  # 13 blocks of 128 tokens, the null block among them; one context is 8
GAP = 1e-3  # of the reference's logprobs: below it, rounding alone may decide between two tokens


@pytest.fixture(scope="module")
def cluster() -> Iterator[LiveCluster]:
    """One worker of each role."""
    cpus = sorted(os.sched_getaffinity(0))
    settings = [f"worker.p0.cpus={cpus[0]}", f"worker.d0.cpus={cpus[-1]}", "model.dtype=float32", "model.context=1024"]
    settings += ["engine.chunk_tokens=128", "engine.max_batch=16", f"engine.kv_mib={KV_MIB}"]
    settings += ["transfer.slab_blocks=12", "transfer.reserve_share=1.0", "cluster.record=true"]
    with LiveCluster(VLLM, settings, 240.0) as cluster:
        yield cluster


def test_a_decode_engine_that_preempts(cluster, prompts, reference) -> None:
    """Three requests that each grow from 2 blocks to 6: its memory holds two of them. They are long, so that the first
    is still there when the last has come, however slow prefill is."""
    long = next(prompt for prompt in prompts if len(prompt) == 2000)
    batch = [long[start : start + 240 + start] for start in range(0, 21, 7)]
    texts = [reference.text(prompt, 450) for prompt in batch]
    results = asyncio.run(all_at_once(cluster, batch, 450))
    assert all(map(same, texts, results))
    preempted = [result.receipt for result in results if result.receipt.preempted]
    assert preempted and all(receipt.recomputed > 0 for receipt in preempted)
    assert all(result.receipt.recomputed == 0 for result in results if not result.receipt.preempted)


def same(text: Text, result: Result) -> bool:
    """Whether the tokens are those of the reference, but for what follows one that rounding may have decided."""
    pairs = zip(result.token_ids, text.ids, strict=True)
    different = next((at for at, (a, b) in enumerate(pairs) if a != b), None)
    return different is None or text.gaps[different] < GAP


def test_preempted_decodes_come_back_beside_prompts(cluster, prompts, reference, capsys) -> None:
    """On the decode worker alone, which does both from here on. Prompts that end just before a block does, so that all
    of them want another block at the same time. A step has room for a third of one that comes back."""
    source = next(prompt for prompt in prompts if len(prompt) == 2000)
    lengths = [250, 378, 380, 251, 379, 252, 381, 120, 505, 253, 377, 254, 376, 378, 250, 122]
    chosen = [source[start : start + length] for start, length in zip(range(0, 160, 10), lengths, strict=True)]
    texts = [reference.text(prompt, TOKENS) for prompt in chosen]
    assert cluster.client().flip("d0", "mixed")["role"] == "mixed"
    cluster.kill("p0")

    def alone() -> bool:
        return [iid for iid, each in cluster.instances().items() if each["state"] == "ready"] == ["d0"]

    wait_until(alone, "p0 is not missed")
    before = len(records(cluster))
    results = asyncio.run(all_at_once(cluster, chosen, TOKENS))
    steps = records(cluster)[before:]
    assert all(map(same, texts, results))
    equal = sum(result.token_ids == text.ids for text, result in zip(texts, results, strict=True))
    both = [step for step in steps if came_back(step) and any(span.key[0] == "p" for span in step.spans)]
    unfinished = [step for step in steps if came_back(step) - {token.key for token in step.tokens}]
    receipts = [result.receipt for result in results]
    again = [receipt for receipt in receipts if receipt.preempted]
    with capsys.disabled():
        print(f" {equal} of {len(chosen)} equal, {len(again)} preempted,", end="")
        print(f" {len(unfinished)} steps too short for that, {len(both)} with prompts", end="")
    assert both and len(unfinished) >= 2, "one step was always enough"
    assert all(receipt.attempts == 1 and receipt.adopted == receipt.prompt_tokens for receipt in receipts)
    assert len(again) >= 2 and all(receipt.recomputed >= receipt.prompt_tokens for receipt in again)
    assert all(receipt.recomputed == 0 for receipt in receipts if not receipt.preempted)


def came_back(step: StepDone) -> set[str]:
    """Decodes of which it computed more than one position: they had been preempted."""
    return {span.key for span in step.spans if span.key[0] == "d" and span.stop - span.start > 1}


def records(cluster: LiveCluster) -> list[StepDone]:
    """What the decode worker's engine did in each step."""
    (record,) = (cluster.folder / "record").glob("d0-*.events")
    return [value(call.event[0]) for call in read(record)[1] if call.event and call.event[0][0] == "StepDone"]


async def all_at_once(cluster: LiveCluster, prompts: list[list[int]], tokens: int) -> list[Result]:
    async with AsyncClient(cluster.config.clients_address, timeout=300) as client:
        calls = [client.generate(p, max_tokens=tokens, ignore_eos=True) for p in prompts]
        results = await asyncio.gather(*calls)
    cluster.wait_idle()
    return results
