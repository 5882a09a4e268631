"""Tampered KV on the live path: with digests it never becomes a token; without them the text shows it, which
proves that the tests that compare texts can fail."""

from __future__ import annotations

import mmap
import os
import signal
from pathlib import Path

import pytest
from live import LiveCluster, wait_until

from tetri.engine.emulated import reference
from tetri.request import Sampling

ONE_EACH = "worker=[{iid='p0', role='prefill'}, {iid='d0', role='decode'}]"
PROMPT = list(range(1, 257))
SAMPLING = Sampling(max_tokens=10)


def flip_a_byte(slab: mmap.mmap, blocks: list[bytes]) -> None:
    at = slab.find(blocks[3]) + 5
    slab[at] ^= 1


def swap_two_blocks(slab: mmap.mmap, blocks: list[bytes]) -> None:
    first, second = slab.find(blocks[2]), slab.find(blocks[9])
    size = len(blocks[2])
    slab[first : first + size], slab[second : second + size] = blocks[9], blocks[2]


def lose_a_chunk(slab: mmap.mmap, blocks: list[bytes]) -> None:
    """As if what should be in the slots had never been written."""
    for block in blocks[:8]:
        at = slab.find(block)
        slab[at : at + len(block)] = bytes(len(block))


TAMPER = [flip_a_byte, swap_two_blocks, lose_a_chunk]


def kv_blocks(cluster: LiveCluster) -> list[bytes]:
    """The bytes of the prompt's blocks, as an engine of its own computes them."""
    from tetri.engine.base import EngineRequest
    from tetri.proc import build

    engine = build.engine(cluster.config)
    engine.add(EngineRequest("x", "prefill", tuple(PROMPT), len(PROMPT), SAMPLING))
    engine.step()
    size = engine.fingerprint.block_bytes
    blocks = [bytearray(size) for _ in range(len(PROMPT) // cluster.config.engine.block_tokens)]
    engine.export("x", 0, len(blocks), [memoryview(block) for block in blocks])
    return [bytes(block) for block in blocks]


def answer(cluster: LiveCluster, tamper: object) -> tuple[list[int], int]:
    """Stop the decode worker, let the prefill worker write its slab, tamper with that, and let it go on."""
    blocks, decode = kv_blocks(cluster), cluster.processes["d0"]
    (segment,) = [name for name in cluster.segments() if "-p0-" in name]
    cluster.wait_idle()
    with open(Path("/dev/shm", segment), "r+b") as file, mmap.mmap(file.fileno(), 0) as slab:
        for block in blocks:  # freed slots keep what an earlier request left there
            while (at := slab.find(block)) >= 0:
                slab[at : at + len(block)] = bytes(len(block))
        decode.send_signal(signal.SIGSTOP)
        try:
            stream = cluster.client().stream(PROMPT, max_tokens=SAMPLING.max_tokens)
            next(stream)  # the first token comes from the prefill worker
            wait_until(lambda: all(slab.find(block) >= 0 for block in blocks), "the slab is not written")
            # Answered by the prefill worker alone, and after it: its digest over the slab is made.
            cluster.client().generate([1], max_tokens=1)
            assert callable(tamper)
            tamper(slab, blocks)
        finally:
            decode.send_signal(signal.SIGCONT)
        result = stream.wait()
    return result.token_ids, result.receipt.attempts


def right(cluster: LiveCluster) -> list[int]:
    made = cluster.config.emulated
    return reference(PROMPT, SAMPLING, made.vocabulary, made.token_bytes)


@pytest.mark.parametrize("tamper", TAMPER)
def test_without_digests_the_text_shows_it(tamper: object, blind: LiveCluster) -> None:
    ids, _ = answer(blind, tamper)
    assert ids[0] == right(blind)[0]  # was there before the KV moved
    assert ids[1:] != right(blind)[1:]


@pytest.mark.parametrize("tamper", TAMPER)
def test_with_digests_it_never_becomes_a_token(tamper: object, guarded: LiveCluster) -> None:
    ids, _ = answer(guarded, tamper)
    assert ids == right(guarded)


@pytest.fixture(scope="module")
def blind():
    with LiveCluster(overrides=[ONE_EACH, "transfer.digest=false"]) as cluster:
        yield cluster
        cluster.wait_idle()


@pytest.fixture(scope="module")
def guarded():
    with LiveCluster(overrides=[ONE_EACH]) as cluster:
        yield cluster
        cluster.wait_idle()
        assert "digest" in cluster.log("d0") and os.path.exists(cluster.folder)

        def counted() -> dict[str, int]:
            return {"given_up": 0, **cluster.instances()["d0"]["counters"]}  # none before its first beat

        wait_until(lambda: counted()["given_up"] >= len(TAMPER), "no beat tells of the wrong chunks")
        given_up = counted()["given_up"]  # each was wrong whenever it was taken
        assert counted()["flipped"] >= 3 * given_up
        assert (counted()["refetched"], counted()["healed"]) == (2 * given_up, 0)
