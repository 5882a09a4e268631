"""The live path over `stream` on one host: real processes, TCP's loopback, senders killed in the middle."""

from __future__ import annotations

from live import LiveCluster

from tetri.engine.emulated import reference
from tetri.request import Sampling

CONF = ["transfer.transport=stream", "emulated.token_bytes=2048", "emulated.blocks=2048"]
PROMPTS = [[seed] * (100 + 97 * seed % 1500) for seed in range(64)]


def expected(cluster: LiveCluster, prompt: list[int]) -> list[int]:
    made = cluster.config.emulated
    return reference(prompt, Sampling(max_tokens=16), made.vocabulary, made.token_bytes)


def test_sixty_four_requests_over_stream_and_senders_killed_in_the_middle() -> None:
    with LiveCluster(overrides=CONF) as cluster:
        client = cluster.client(timeout=60)
        streams = [client.stream(prompt, max_tokens=16) for prompt in PROMPTS]
        for killed, stream in (("p0", streams[0]), ("p1", streams[10])):
            next(stream)  # so there are chunks on their way
            cluster.kill(killed)
            cluster.start(killed)
            cluster.wait_ready(killed)
        results = [stream.wait() for stream in streams]
        assert [result.token_ids for result in results] == [expected(cluster, prompt) for prompt in PROMPTS]
        assert {result.receipt.transport for result in results} == {"stream"}
        assert all(result.receipt.recomputed == 0 for result in results)
        assert any(result.receipt.attempts > 1 for result in results)
        cluster.wait_idle()
