"""The predictor of kind `hidden` in a live cluster: what its head says of the states that transformers computes for the
same tokens is what both workers' cores hear."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace

import numpy as np
import pytest
from live import VLLM, LiveCluster
from states import by_transformers

from tests.predict import made
from tetri.client import AsyncClient
from tetri.models import weights_hash
from tetri.predict.card import HEAD, write_card
from tetri.predict.heads import save_head
from tetri.predict.model import PLACE, load
from tetri.proc.recorder import read, value
from tetri.request import LengthDistribution

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]

LAYER, EVERY, HIDDEN = 16, 4, 576
LENGTHS = (9, 200, 600)  # 600: two chunks
OUTPUTS = 10
CONF = ["model.dtype=float32", "model.context=896", "engine.max_batch=8", "engine.kv_mib=400"]
CONF += ["engine.chunk_tokens=512", "transfer.slab_blocks=16", "cluster.record=true"]
CONF += ["policy.length=trained", "predictor.kind=hidden"]


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """A head of random weights: it says something else of each state."""
    folder = tmp_path_factory.mktemp("predictor")
    place = folder / "hidden"
    place.mkdir()
    head = made.head(HIDDEN + PLACE)
    digest = save_head(replace(head, scale=np.full(HIDDEN + PLACE, 8.0, "f4")), place / HEAD)
    card = made.card("hidden", digest, layer=LAYER, every=EVERY)
    write_card(replace(card, weights=weights_hash(model)), place)
    return folder


def test_both_workers_hear_what_the_head_says_of_the_models_own_states(model, prompts, folder, capsys):
    source = next(prompt for prompt in prompts if len(prompt) == 2000)
    chosen = [source[30 * place : 30 * place + length] for place, length in enumerate(LENGTHS)]
    results, heard, status = asyncio.run(serve(chosen, folder))
    assert heard.keys() == {(iid, outputs) for iid, outputs in (("p0", 0), ("d0", 4), ("d0", 8))}
    assert {len(told) for told in heard.values()} == {len(chosen)}, "each leg once"
    states, head = by_transformers(model, [LAYER]), load(folder, "hidden", weights_hash(model))
    worst = 0.0
    for prompt, ids in zip(chosen, results, strict=True):
        rows = states([*prompt, *ids])[:, 0]
        for (_, outputs), told in heard.items():
            (right,) = head.estimate(rows[len(prompt) + outputs - 1][None], [outputs])
            worst = max(worst, min(apart(right, distribution) for distribution in told))
    different = {distribution.shares for told in heard.values() for distribution in told}
    with capsys.disabled():
        print(f" {worst:.1e} apart ", end="")
    assert worst < 1e-3 and len(different) == 9
    assert {iid: told.kind for iid, told in status.items()} == {"p0": "hidden", "d0": "hidden"}
    assert status["p0"].predicted == len(chosen) and status["p0"].late == 0


def apart(one: LengthDistribution, other: LengthDistribution) -> float:
    return max(abs(a - b) for a, b in zip(one.shares, other.shares, strict=True))


async def serve(prompts, folder):
    """The answers; by worker and outputs, the odds that its core heard; by worker, what its last beat said."""
    cpus = sorted(os.sched_getaffinity(0))
    pins = [f"worker.p0.cpus={cpus[0]}", f"worker.d0.cpus={cpus[-1]}", f"predictor.folder={folder}"]
    with LiveCluster(VLLM, [*CONF, *pins], 240.0) as cluster:
        async with AsyncClient(cluster.config.clients_address, timeout=200) as client:
            calls = [client.generate(p, max_tokens=OUTPUTS, min_tokens=OUTPUTS) for p in prompts]
            results = await asyncio.gather(*calls)
        cluster.wait_idle()
        heard, status = {}, {}
        for path in (cluster.folder / "record").glob("[pd]0-*.events"):
            iid = path.name[:2]
            for call in read(path)[1]:
                for pair in call.event:
                    for told in value(pair).estimates if pair[0] == "StepDone" else ():
                        heard.setdefault((iid, told.outputs), []).append(told.distribution)
                for name, data in call.actions:
                    message = value((name, data)).message if name == "Send" else None
                    if type(message).__name__ == "Heartbeat":
                        status[iid] = message.predictor
    return [result.token_ids for result in results], heard, status
