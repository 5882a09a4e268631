"""The whole live path on the emulated engine: real processes, real sockets, real shared memory, tokens verified."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
from live import LiveCluster, wait_until
from raw_client import RawClient

from tetri.client import AsyncClient, RequestRefused, Result
from tetri.engine.emulated import reference
from tetri.request import Sampling
from tetri.text import ByteTokenizer, decode


@pytest.fixture(scope="module")
def cluster() -> Iterator[LiveCluster]:
    with LiveCluster(overrides=["broker.client_grace_s=0.5"]) as cluster:
        yield cluster
        cluster.wait_idle()


def expected(cluster: LiveCluster, prompt: list[int], **sampling: object) -> list[int]:
    made = cluster.config.emulated
    return reference(prompt, Sampling(**sampling), made.vocabulary, made.token_bytes)


def check(cluster: LiveCluster, prompt: list[int], result: Result, **sampling: object) -> None:
    assert result.token_ids == expected(cluster, prompt, **sampling)
    assert result.text == decode(ByteTokenizer(), result.token_ids)


def test_text_is_answered_and_the_receipt_says_what_moved(cluster: LiveCluster) -> None:
    text = "The quick brown fox. " * 60
    result = cluster.client().generate(text, max_tokens=17)
    check(cluster, list(text.encode()), result, max_tokens=17)
    receipt, blocks = result.receipt, -(-len(text) // cluster.config.engine.block_tokens)
    assert (receipt.prompt_tokens, receipt.adopted, receipt.recomputed) == (len(text), len(text), 0)
    assert receipt.kv_bytes == blocks * cluster.config.engine.block_tokens * cluster.config.emulated.token_bytes
    assert receipt.chunks == 3 and receipt.transport == "shm" and receipt.attempts == 1
    assert receipt.prefill_instance in ("p0", "p1") and receipt.decode_instance in ("d0", "d1")
    stages = ["queued", "prefill", "moving", "waiting", "decode"]  # the news of a short one may overtake another
    assert list(result.timeline) == [stage for stage in stages if stage in result.timeline]
    assert {"queued", "decode"} <= set(result.timeline)
    assert sum(result.timeline.values()) == pytest.approx(result.jct_s)
    assert result.ttft_s is not None and 0 < result.ttft_s < result.jct_s


def test_choices_share_one_prefill_and_one_transfer_and_each_equals_a_request_with_its_seed(
    cluster: LiveCluster,
) -> None:
    prompt = [17 + place % 50 for place in range(1000)]
    sampling = {"max_tokens": 12, "temperature": 1.0, "ignore_eos": True}
    alone = cluster.client().generate(prompt, seed=5, **sampling)
    results = cluster.client().generate(prompt, seed=5, n=4, **sampling).choices
    assert len(results) == 4 and results[0].token_ids == alone.token_ids
    for index, result in enumerate(results):
        check(cluster, prompt, result, seed=5 + index, **sampling)
    assert len({tuple(result.token_ids) for result in results}) == 4
    assert sum(result.receipt.kv_bytes or 0 for result in results) == alone.receipt.kv_bytes
    assert sum(result.receipt.chunks or 0 for result in results) == alone.receipt.chunks
    assert {(result.receipt.adopted, result.receipt.recomputed) for result in results} == {(1000, 0)}


@pytest.mark.parametrize(("min_tokens", "count"), [(0, 2), (1, 2), (2, 12), (12, 12)])
def test_a_stop_text_counts_from_min_tokens_on(cluster: LiveCluster, min_tokens: int, count: int) -> None:
    prompt = [21, 22, 23]
    right = expected(cluster, prompt, max_tokens=12)
    stop = decode(ByteTokenizer(), right[1:2])
    assert stop not in decode(ByteTokenizer(), right[:1] + right[2:])
    result = cluster.client().generate(prompt, max_tokens=12, stop=[stop], min_tokens=min_tokens)
    assert result.token_ids == right[:count]
    assert result.text == decode(ByteTokenizer(), right[:1] if count == 2 else right)
    assert result.finish_reason == ("stop" if count == 2 else "length")


def test_a_client_that_vanishes_is_cancelled(cluster: LiveCluster) -> None:
    with RawClient(cluster.config.clients_address) as client:
        client.submit([4] * 50, max_tokens=8000)
        wait_until(lambda: any(each["load"]["running"] for each in cluster.instances().values()), "it does not run")
    cluster.wait_idle()


def test_a_client_that_vanishes_while_its_request_is_queued_is_cancelled_before_the_prefill(
    cluster: LiveCluster,
) -> None:
    """No message of the request shows it: the broker says something to a quiet client every second."""
    status = cluster.client().status
    prefill = [cluster.processes[iid] for iid in ("p0", "p1")]
    for process in prefill:
        process.send_signal(signal.SIGSTOP)
    try:
        with RawClient(cluster.config.clients_address) as client:
            assert client.submit([4] * 5000, max_tokens=8)["type"] == "accepted"
        assert status()["requests"] == {"queued": 1}
        wait_until(lambda: not status()["requests"], "its request is still there")
    finally:
        for process in prefill:
            process.send_signal(signal.SIGCONT)
    assert status()["counters"]["ended_cancelled"] >= 1
    cluster.wait_idle()


def test_64_at_once(cluster: LiveCluster) -> None:
    rng = random.Random(7)
    prompts = [[rng.randrange(1, 32000) for _ in range(rng.randint(1, 2000))] for _ in range(64)]
    lengths = [rng.randint(1, 120) for _ in prompts]

    async def all_at_once() -> list[Result]:
        async with AsyncClient(cluster.config.clients_address) as client:
            calls = (client.generate(p, max_tokens=n) for p, n in zip(prompts, lengths, strict=True))
            return await asyncio.gather(*calls)

    results = asyncio.run(all_at_once())
    for prompt, length, result in zip(prompts, lengths, results, strict=True):
        check(cluster, prompt, result, max_tokens=length)
        assert result.receipt.recomputed == 0
    used = {result.receipt.prefill_instance for result in results}
    assert used == {"p0", "p1"}
    cluster.wait_idle()


def test_a_client_of_pyzmq_and_msgpack_alone(cluster: LiveCluster) -> None:
    """docs/protocol.md is enough: every verb, a resent Submit, a new connection that goes on in the middle."""
    address, prompt = cluster.config.clients_address, [11, 12, 13] * 200
    right = expected(cluster, prompt, max_tokens=20)
    with RawClient(address) as client:
        ids, text, done = client.generate(prompt, max_tokens=20)
        assert (ids, text) == (right, decode(ByteTokenizer(), right))
        assert done["receipt"]["adopted"] == 600 and done["reason"] == "length"
        assert client.submit([], key="empty")["reason"].startswith("the prompt is empty")
        first = client.submit(prompt, key="same", max_tokens=20)
        assert client.submit(prompt, key="same", max_tokens=20) == first
        with RawClient(address) as other:
            other.secret = client.secret
            other.attach(first["rid"], start=0)
            *deltas, done = other.stream(first["rid"])
            assert [token for delta in deltas for token in delta["ids"]] == right
        endless = client.submit(prompt, max_tokens=7000)
        assert client.cancel(endless["rid"])["reason"] == "cancelled"
        assert client.inspect()["model"] == "emulated"


def test_nobody_gets_at_the_request_of_another_client_but_an_operator(cluster: LiveCluster) -> None:
    """Who knows its key and its id, but not its secret, learns nothing and stops nothing."""
    address, prompt = cluster.config.clients_address, [21, 22, 23] * 50
    with RawClient(address) as client, RawClient(address) as other, RawClient(address) as again:
        rid = client.submit(prompt, key="mine", max_tokens=7500)["rid"]
        assert len(bytes.fromhex(rid)) == 16
        for tried in (prompt, [9] * 20):
            assert "another request" in other.submit(tried, key="mine", max_tokens=7500)["reason"]
        for unknown in (rid, "0" * 32):
            other.attach(unknown)
            why = f"no request {unknown} is known here"
            assert other.receive(key=unknown)["reason"] == why == other.cancel(unknown)["reason"]
        other.send("change_role", key="flip", iid="p0", role="mixed")  # not here: dropped without an answer
        other.send("end_request", rid=rid)
        assert other.inspect()["requests"] and cluster.roles()["p0"] == "prefill"
        assert all(message["type"] == "delta" for message in islice(client.stream(rid), 200))
        again.secret = client.secret  # another connection of the same client
        assert again.submit(prompt, key="mine", max_tokens=7500)["rid"] == rid
        operator = cluster.operator()
        operator.end(rid)
        with pytest.raises(RequestRefused, match="no request nobody's is known here"):
            operator.end("nobody's")
        *deltas, done = again.stream(rid)
    ids = [token for delta in deltas for token in delta["ids"]]
    assert done["reason"] == "cancelled" and ids == expected(cluster, prompt, max_tokens=len(ids))
    place = Path(cluster.config.operators_address.removeprefix("ipc://"))
    assert place.is_socket() and place.stat().st_mode & 0o077 == 0
    cluster.wait_idle()
