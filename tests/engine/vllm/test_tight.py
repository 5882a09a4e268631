"""The real model with far too little memory: decodes are preempted and computed again. One worker that does both needs
several steps for that; what its engine does then must be what its core takes for right."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from live import VLLM, LiveCluster
from vllm_process import START_S

from tetri.engine_request import StepDone
from tetri.proc.recorder import read, value

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]

TOKENS = 130  # five blocks, of which two are left free for each that runs
KV_MIB = 33  # some 22 blocks of 32 tokens; one context is 16


@pytest.fixture
def cluster() -> Iterator[LiveCluster]:
    """One worker that does both."""
    settings = [f"worker=[{{iid='d0',role='mixed',cpus='{min(os.sched_getaffinity(0))}'}}]", "model.dtype=float32"]
    settings += ["model.context=512", "engine.chunk_tokens=128", "engine.max_batch=16", f"engine.kv_mib={KV_MIB}"]
    settings += ["engine.block_tokens=32", "transfer.reserve_share=1.0", "cluster.record=true"]
    with LiveCluster(VLLM, settings, START_S) as cluster:
        yield cluster


def test_preempted_decodes_come_back(cluster, prompts, reference, capsys) -> None:
    """Prompts that grow into more blocks than are left free for them. A step has room for a third of one that comes
    back."""
    source = next(prompt for prompt in prompts if len(prompt) == 2000)
    lengths = [122, 250, 124, 350, 252, 123, 350, 126, 60, 250, 124, 123]
    chosen = [source[10 * place : 10 * place + length] for place, length in enumerate(lengths)]
    texts = [reference.text(prompt, TOKENS) for prompt in chosen]
    results = cluster.answers(chosen, max_tokens=TOKENS, ignore_eos=True)
    cluster.wait_idle()
    assert all(text.agrees(result.token_ids) for text, result in zip(texts, results, strict=True))
    unfinished = [step for step in records(cluster) if came_back(step) - {token.key for token in step.tokens}]
    receipts = [result.receipt for result in results]
    again = [receipt for receipt in receipts if receipt.preempted]
    with capsys.disabled():
        print(f" {len(again)} preempted, {len(unfinished)} steps too short for that", end="")
    assert len(unfinished) >= 2, "one step was always enough"
    assert all(receipt.attempts == 1 and receipt.adopted == 0 for receipt in receipts)
    assert len(again) >= 2 and all(receipt.recomputed == receipt.prompt_tokens for receipt in again)
    assert all(receipt.local == receipt.prompt_tokens for receipt in receipts if not receipt.preempted)


def records(cluster: LiveCluster) -> list[StepDone]:
    """What the engine did in each step."""
    (record,) = (cluster.folder / "record").glob("d0-*.events")
    return [value(call.event[0]) for call in read(record)[1] if call.event and call.event[0][0] == "StepDone"]


def came_back(step: StepDone) -> set[str]:
    """Decodes of which it computed more than one position: they had been preempted."""
    return {span.key for span in step.spans if span.key[0] == "d" and span.stop - span.start > 1}
