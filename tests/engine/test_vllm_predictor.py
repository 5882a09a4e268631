"""The shipped predictor beside the real model: both kinds in one prefill worker, from the prompt to the decode side."""

from __future__ import annotations

import os

import pytest
from live import VLLM, LiveCluster, wait_until

from tetri.client import Client
from tetri.proc.recorder import read, value
from tetri.wire.handover import Offer

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]

START_S = 240.0
CONF = ["model.context=1024", "engine.max_batch=8", "engine.chunk_tokens=128", "engine.kv_mib=300"]
WANTED = ["policy.length=trained", "predictor.kind=both", "cluster.record=true"]
SHORT = ["Why is the sky blue?", "Name a colour.", "Write a long story about a fox and a hen."]
LONG = "Summarise this in one sentence: " + "the quick brown fox jumps over the lazy dog, and " * 30
OUTPUT = 70  # more than the first re-estimate needs


def test_both_kinds_reach_the_decode_side() -> None:
    cpus = sorted(os.sched_getaffinity(0))
    pins = [f"worker.p0.cpus={cpus[0]}", f"worker.d0.cpus={cpus[-1]}"]
    with (
        LiveCluster(VLLM, [*CONF, *WANTED, *pins], START_S) as cluster,
        Client(cluster.config.clients_address, timeout=120) as client,
    ):
        for text in [*SHORT, LONG]:
            client.generate(messages=[{"role": "user", "content": text}], max_tokens=OUTPUT, temperature=0.7, seed=1)
        wait_until(lambda: cluster.instances()["p0"]["predictor"]["scored"] == 4, "the ends are not told")
        told = cluster.instances()["p0"]["predictor"]
        assert (told["kind"], told["on"], told["predicted"], told["cut"]) == ("both", True, 4, 1), told
        assert "shipped with tetri" in told["note"]
        cluster.stop()
        (path,) = (cluster.folder / "record").glob("d0-*.events")
        heard = [value(call.event[0]) for call in read(path)[1] if call.event]
        offers = [event.length for event in heard if isinstance(event, Offer)]
        assert len(offers) >= 4 and None not in offers and all(length.high <= OUTPUT + 1 for length in offers)
        steps = [told for event in heard for told in getattr(event, "foretold", ())]
        assert {told.outputs for told in steps} == {64}
