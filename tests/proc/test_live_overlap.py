"""A chunk's KV moves while the next chunk computes: by the timestamps of two live workers' records."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live import LiveCluster

from tetri.bench.handover.stages import moves, overlap

SHORT, LONG, ROUNDS = 512, 4096, 5
CHUNKS = LONG // 512
TOKEN_BYTES = 8192  # a chunk has 4 MB then: several milliseconds until it is in the other engine
PASS_S = 0.05  # of 512 tokens
CONF = f"""
[engine]
kind = "emulated"
chunk_tokens = 512
block_tokens = 16
cost = "{{cost}}"

[emulated]
blocks = 600
token_bytes = {TOKEN_BYTES}

[transfer]
slab_blocks = 128

[[worker]]
iid = "p0"
role = "prefill"

[[worker]]
iid = "d0"
role = "decode"
"""


@pytest.fixture(scope="module")
def by_length(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Any]]:
    """The moves of prompts of both lengths, alternated."""
    folder = tmp_path_factory.mktemp("overlap")
    cost, conf = folder / "brisk.toml", folder / "pair.toml"
    cost.write_text(f"prefill = [[1, 0.005], [512, {PASS_S}]]\ndecode = [[1, 0.005], [32, 0.01]]\n")
    conf.write_text(CONF.format(cost=cost))
    with LiveCluster(conf, ["cluster.record=true"]) as cluster:
        client = cluster.client()
        for number in range(ROUNDS):
            for length in (SHORT, LONG):
                prompt = [300 + (7 * number + place) % 5000 for place in range(length)]
                receipt = client.generate(prompt, max_tokens=3, ignore_eos=True).receipt
                assert (receipt.chunks, receipt.attempts, receipt.transport) == (length // 512, 1, "shm")
        cluster.wait_idle()
        records = cluster.folder / "record"
        found = moves(*(only(records, iid) for iid in ("p0", "d0")))
    assert len(found) == 2 * ROUNDS
    yield {length: [move for move in found if move.tokens == length] for length in (SHORT, LONG)}


def only(folder: Path, iid: str) -> Path:
    (path,) = folder.glob(f"{iid}-*.events")
    return path


def test_the_copy_of_each_chunk_lies_inside_the_next_ones_forward_pass(by_length: dict[int, Any]) -> None:
    """Of every chunk in at least one prompt: others on this machine may hold one copy up for a whole pass."""
    seen = [overlap([move]) for move in by_length[LONG]]
    assert {each.chunks for each in seen} == {CHUNKS - 1}
    assert max(each.inside for each in seen) == CHUNKS - 1
    assert sum(each.inside for each in seen) > 0.8 * sum(each.chunks for each in seen)


def test_the_stages_of_a_hand_over_add_up(by_length: dict[int, Any]) -> None:
    for move in (*by_length[SHORT], *by_length[LONG]):
        stages = move.stages()
        assert sum(stages.values()) == pytest.approx(move.seconds)
        assert min(stages.values()) >= 0
