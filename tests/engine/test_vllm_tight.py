"""One worker that does both on the real model, with far too little memory: decodes are preempted and computed again,
over several steps, beside chunks of prompts. What the engine does then must be what the worker's core takes for right.
"""

from __future__ import annotations

import asyncio
import os

import pytest
from live import VLLM, LiveCluster

from tetri.client import AsyncClient, Result
from tetri.leg import StepDone
from tetri.proc.recorder import read, value
from tetri.request import Sampling

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]

TOKENS = 20
KV_MIB = 74  # 13 blocks of 128 tokens, the null block among them; one context is 8
GAP = 1e-3  # of the reference's logprobs: below it, rounding alone may decide between two tokens
ONE = "worker=[{{iid='m0', role='mixed', cpus='{cpu}'}}]"


def test_preempted_decodes_come_back_beside_prompts(prompts, reference, capsys) -> None:
    """Prompts that end just before a block does, so that all of them want another block at the same time. A step has
    room for a third of one that comes back."""
    source = next(prompt for prompt in prompts if len(prompt) == 2000)
    lengths = [250, 378, 380, 251, 379, 252, 381, 120, 505, 253, 377, 254, 376, 378, 250, 122]
    chosen = [source[start : start + length] for start, length in zip(range(0, 160, 10), lengths, strict=True)]
    sampling = Sampling(max_tokens=TOKENS, ignore_eos=True)
    texts = [reference.generate(prompt, sampling, ()) for prompt in chosen]
    results, steps = asyncio.run(serve(chosen))
    equal = 0
    for text, result in zip(texts, results, strict=True):
        equal += result.token_ids == text.ids
        if result.token_ids != text.ids:
            at = next(i for i, (a, b) in enumerate(zip(result.token_ids, text.ids, strict=True)) if a != b)
            assert text.gaps[at] < GAP
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


async def serve(prompts: list[list[int]]) -> tuple[list[Result], list[StepDone]]:
    """The answers, and what the engine did in each step."""
    settings = [ONE.format(cpu=max(os.sched_getaffinity(0))), "model.dtype=float32", "model.context=1024"]
    settings += ["engine.chunk_tokens=128", "engine.max_batch=16", f"engine.kv_mib={KV_MIB}"]
    settings += ["transfer.slab_blocks=12", "transfer.reserve_share=1.0", "cluster.record=true"]
    with LiveCluster(VLLM, settings, 240.0) as cluster:
        async with AsyncClient(cluster.config.clients_address, timeout=300) as client:
            calls = [client.generate(p, max_tokens=TOKENS, ignore_eos=True) for p in prompts]
            results = await asyncio.gather(*calls)
        cluster.wait_idle()
        (record,) = (cluster.folder / "record").glob("m0-*.events")
        events = [value(call.event[0]) for call in read(record)[1] if call.event and call.event[0][0] == "StepDone"]
    return results, events
