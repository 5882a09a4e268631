"""The shipped predictor beside the real model: both kinds in one prefill worker, from the prompt to the decode side.
What its head says of the states that transformers computes for the same tokens is what both workers' cores hear."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest
from live import VLLM, LiveCluster, wait_until
from states import by_transformers

from tetri.client import AsyncClient, Client, Result
from tetri.models import weights_hash
from tetri.predict.model import load, shipped_for
from tetri.proc.recorder import read, value
from tetri.request import LengthDistribution
from tetri.wire.handover import Offer

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]

START_S = 240.0
CONF = ["model.dtype=float32", "model.context=1024", "engine.max_batch=8", "engine.chunk_tokens=128"]
CONF += ["engine.kv_mib=400", "policy.length=trained", "predictor.kind=both", "cluster.record=true"]
SHORT = ["Why is the sky blue?", "Name a colour.", "Write a long story about a fox and a hen."]
LONG = "Summarise this in one sentence: " + "the quick brown fox jumps over the lazy dog, and " * 30
EVERY = 64  # tokens between two estimates of the shipped head
OUTPUT = EVERY + 6
LENGTHS = (9, 200, 600)  # of prompts; 600: five chunks


@pytest.fixture(scope="module")
def cluster() -> Iterator[LiveCluster]:
    cpus = sorted(os.sched_getaffinity(0))
    pins = [f"worker.p0.cpus={cpus[0]}", f"worker.d0.cpus={cpus[-1]}"]
    with LiveCluster(VLLM, [*CONF, *pins], START_S) as cluster:
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
    wait_until(lambda: cluster.instances()["p0"]["predictor"]["scored"] == 4, "the ends are not told")
    assert cluster.instances()["d0"]["predictor"]["kind"] == "both"
    told = cluster.instances()["p0"]["predictor"]
    assert (told["kind"], told["on"], told["predicted"], told["cut"]) == ("both", True, 4, 1), told
    assert "shipped with tetri" in told["note"]
    events = heard(cluster, "d0")
    offers = [event.length for event in events if isinstance(event, Offer)]
    assert len(offers) >= 4 and None not in offers and all(length.high <= OUTPUT + 1 for length in offers)
    assert {told.outputs for event in events for told in getattr(event, "estimates", ())} == {EVERY}


def test_both_workers_hear_what_the_head_says_of_the_models_own_states(cluster, model, prompts, capsys) -> None:
    source = next(prompt for prompt in prompts if len(prompt) == 2000)
    chosen = [source[30 * place : 30 * place + length] for place, length in enumerate(LENGTHS)]
    before = {iid: len(heard(cluster, iid)) for iid in ("p0", "d0")}
    results = asyncio.run(answers(cluster, chosen))
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


def apart(one: LengthDistribution, other: LengthDistribution) -> float:
    return max(abs(a - b) for a, b in zip(one.shares, other.shares, strict=True))


async def answers(cluster: LiveCluster, prompts: list[list[int]]) -> list[Result]:
    """All asked at once."""
    async with AsyncClient(cluster.config.clients_address, timeout=200) as client:
        calls = [client.generate(p, max_tokens=OUTPUT, min_tokens=OUTPUT) for p in prompts]
        return await asyncio.gather(*calls)
