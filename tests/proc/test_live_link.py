"""Emulated links, live: a prompt's KV takes as long as the arithmetic says, which is the simulator's too."""

from __future__ import annotations

from live import LiveCluster

from tetri.engine.emulated import reference
from tetri.request import Sampling

TOKEN_BYTES = 819_200  # of OPT-13B's KV
GBS = 2.0
SLOW = (
    f"transfer.emulate_gbs={GBS}",
    f"transfer.emulate_token_bytes={TOKEN_BYTES}",
    "transfer.slab_blocks=1024",
    "transfer.offer_s=30",
)


def seconds(tokens: int) -> float:
    """Of a prompt's KV, whole blocks of 16 tokens, over the link alone."""
    return -(-tokens // 16) * 16 * TOKEN_BYTES / (GBS * 1e9)


def test_a_prompts_kv_takes_as_long_as_its_bytes_over_the_link() -> None:
    """The engine takes no time, so the link is what a request waits for."""
    with LiveCluster(overrides=SLOW) as cluster:
        client, made = cluster.client(), cluster.config.emulated
        assert client.generate([1, 2, 3], max_tokens=2).timeline.get("moving", 0.0) < 0.5
        for tokens in (1024, 4096):
            prompt = [*range(1, tokens + 1)]
            result = client.generate(prompt, max_tokens=5, ignore_eos=True)
            wanted = reference(prompt, Sampling(max_tokens=5, ignore_eos=True), made.vocabulary, made.token_bytes)
            assert result.token_ids == wanted and result.receipt.recomputed == 0
            assert seconds(tokens) <= result.jct_s < 1.6 * seconds(tokens) + 0.3
            assert result.timeline["moving"] > 0.9 * seconds(tokens) - 0.1
        cluster.wait_idle()
