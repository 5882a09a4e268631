"""A chunk's KV moves while the next chunk computes: by the timestamps of two live workers' records. So the hand-over
takes as long for a long prompt as for a short one."""

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
SETTINGS = [
    "worker=[{iid='p0', role='prefill'}, {iid='d0', role='decode'}]",
    f"emulated.token_bytes={TOKEN_BYTES}",
    "emulated.blocks=600",
    "engine.block_tokens=16",
    "transfer.slab_blocks=128",
    "cluster.record=true",
]


@pytest.fixture(scope="module")
def by_length(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Any]]:
    """The moves of prompts of both lengths, alternated."""
    cost = tmp_path_factory.mktemp("overlap") / "brisk.toml"
    cost.write_text(f"prefill = [[1, 0.005], [512, {PASS_S}]]\ndecode = [[1, 0.005], [32, 0.01]]\n")
    with LiveCluster(overrides=[*SETTINGS, f"engine.cost={cost}"]) as cluster:
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


def test_the_hand_over_does_not_grow_with_the_prompt(by_length: dict[int, Any]) -> None:
    """Copied after the end of prefill, the first chunks would take as long again each as the last one does."""
    short, long = (min(by_length[length], key=lambda move: move.seconds) for length in (SHORT, LONG))
    assert long.seconds - short.seconds < 0.010
    copies = [stage["export"] + stage["copy"] for stage in (move.stages() for move in by_length[LONG])]
    assert (CHUNKS - 1) * min(copies) > 0.010, "the copies are too small to tell"
