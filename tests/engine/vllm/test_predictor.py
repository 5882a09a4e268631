"""The shipped predictor beside the real model: both kinds in one prefill worker, from the prompt to the decode side.
What its head says of the states that transformers computes for the same tokens is what both workers' cores hear.

The KV goes through a GPU's slab that a stand-in plays: gathered by the prefill worker, read through its handle,
scattered by the decode worker; the same tokens as plain vLLM in one engine."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest
from live import REPOSITORY, VLLM, LiveCluster, wait_until
from states import by_transformers
from vllm_process import START_S

from tetri.client import Client
from tetri.models import weights_hash
from tetri.predict.model import load, shipped_for
from tetri.proc.recorder import read, value
from tetri.request import LengthDistribution, blocks_for
from tetri.wire.handover import Offer

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]

CONF = ["model.dtype=float32", "model.context=1024", "engine.max_batch=8", "engine.kv_mib=400"]
CONF += ["policy.length=trained", "predictor.kind=both", "cluster.record=true", "transfer.slab_blocks=24"]
SHORT = ["Why is the sky blue?", "Name a colour.", "Write a long story about a fox and a hen."]
LONG = "Summarise this in one sentence: " + "the quick brown fox jumps over the lazy dog, and " * 50  # two chunks
EVERY = 64  # tokens between two estimates of the shipped head
OUTPUT = EVERY + 6
LENGTHS = (9, 200, 600)  # of prompts; 600: two chunks
TOKENS = 12


@pytest.fixture(scope="module")
def cluster() -> Iterator[LiveCluster]:
    cpus = sorted(os.sched_getaffinity(0))
    gpus = [f"worker.p0.cpus={cpus[0]}", f"worker.d0.cpus={cpus[-1]}", "worker.p0.gpu=0", "worker.d0.gpu=0"]
    with tempfile.TemporaryDirectory(prefix="tetri-cuda-", dir="/dev/shm") as folder:
        prologue = f"sys.path.insert(0, {str(REPOSITORY)!r}); from played_gpu import play; play({folder!r}); "
        with LiveCluster(VLLM, [*CONF, *gpus], START_S, prologue) as cluster:
            yield cluster


def heard(cluster: LiveCluster, iid: str) -> list[Any]:
    """All that the core of this worker was told."""
    cluster.wait_idle()
    (path,) = (cluster.folder / "record").glob(f"{iid}-*.events")
    return [value(call.event[0]) for call in read(path)[1] if call.event]


def test_both_kinds_reach_the_decode_side(cluster) -> None:
    with Client(cluster.config.clients_address, timeout=120) as client:
        for text in [*SHORT, LONG]:
            client.generate(messages=[{"role": "user", "content": text}], max_tokens=OUTPUT, temperature=0.7, seed=1)
    told = {}

    def all_is_told() -> bool:
        told.update(cluster.instances()["p0"]["predictor"])
        return (told["scored"], told["cut"]) == (4, 1)

    wait_until(all_is_told, "the ends and the long prompt are not told")
    assert cluster.instances()["d0"]["predictor"]["kind"] == "both"
    assert (told["kind"], told["on"], told["predicted"]) == ("both", True, 4), told
    assert "shipped with tetri" in told["note"]
    events = heard(cluster, "d0")
    offers = [event.length for event in events if isinstance(event, Offer)]
    assert len(offers) >= 4 and None not in offers and all(length.high <= OUTPUT + 1 for length in offers)
    assert {told.outputs for event in events for told in getattr(event, "estimates", ())} == {EVERY}


def test_both_workers_hear_what_the_head_says_of_the_models_own_states(cluster, model, prompts, capsys) -> None:
    source = next(prompt for prompt in prompts if len(prompt) == 2000)
    chosen = [source[30 * place : 30 * place + length] for place, length in enumerate(LENGTHS)]
    before = {iid: len(heard(cluster, iid)) for iid in ("p0", "d0")}
    results = cluster.answers(chosen, max_tokens=OUTPUT, min_tokens=OUTPUT)
    told: dict[tuple[str, int], list[LengthDistribution]] = {}
    for iid, count in before.items():
        for event in heard(cluster, iid)[count:]:
            for each in getattr(event, "estimates", ()):
                told.setdefault((iid, each.outputs), []).append(each.distribution)
    assert {name: len(distribution) for name, distribution in told.items()} == {
        ("p0", 0): len(chosen),
        ("d0", EVERY): len(chosen),
    }
    weights = weights_hash(model)
    folder = shipped_for(weights)
    assert folder is not None
    head = load(folder, "hidden", weights)
    states = by_transformers(model, [head.card.layer])
    worst = 0.0
    for prompt, result in zip(chosen, results, strict=True):
        rows = states([*prompt, *result.token_ids])[:, 0]
        for (_, outputs), distribution in told.items():
            (right,) = head.estimate(rows[len(prompt) + outputs - 1][None], [outputs])
            worst = max(worst, min(apart(right, each) for each in distribution))
    nearest = min(
        apart(*two) for two in combinations([each for distribution in told.values() for each in distribution], 2)
    )
    with capsys.disabled():
        print(f" {worst:.1e} apart, two states at least {nearest:.1e} ", end="")
    assert worst < 1e-3 and nearest > 10 * worst


def test_a_hand_over_through_a_slab_in_a_gpus_memory(cluster, reference, prompts) -> None:
    chosen = prompts[:12]
    client, block = cluster.client(), cluster.config.engine.block_tokens
    for prompt in chosen:
        result = client.generate(prompt, max_tokens=TOKENS, ignore_eos=True)
        receipt = result.receipt
        assert result.token_ids == reference.text(prompt, TOKENS).ids
        assert (receipt.transport, receipt.adopted, receipt.recomputed) == ("cuda_ipc", len(prompt), 0)
        assert receipt.kv_bytes == blocks_for(len(prompt), block) * 30 * 3 * 128 * block * 4


def apart(one: LengthDistribution, other: LengthDistribution) -> float:
    return max(abs(a - b) for a, b in zip(one.shares, other.shares, strict=True))
