"""Decode workers that cannot read KV, live: the others serve, and status names them; an error only by patience."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from live import LiveCluster, wait_until

from tetri.client import RequestFailed
from tetri.engine.emulated import reference
from tetri.request import Sampling

PROMPTS = [[*range(1 + seed, 300 + 20 * seed)] for seed in range(24)]


@contextmanager
def cut(cluster: LiveCluster) -> Iterator[None]:
    """The cuts of the configuration ("@file") are in force."""
    file = cluster.folder / "cut"
    file.touch()
    try:
        yield
    finally:
        file.unlink()


def test_a_worker_that_cannot_read_costs_no_request_and_serves_again_when_it_can() -> None:
    workers = "worker=[{iid='p0',role='prefill'},{iid='d0',role='decode'},{iid='d1',role='decode'}]"
    with LiveCluster(overrides=[workers, "transfer.cuts=d0@file"]) as cluster:
        client, made = cluster.client(), cluster.config.emulated
        with cut(cluster):
            for prompt, result in zip(PROMPTS, cluster.answers(PROMPTS, max_tokens=8), strict=True):
                assert result.token_ids == reference(prompt, Sampling(max_tokens=8), made.vocabulary, made.token_bytes)
                assert result.receipt.attempts <= 2 and result.receipt.decode_instance == "d1"
            wait_until(lambda: _of_d0(client.status()["notes"]) != [], "status does not name it")
            (line,) = _of_d0(client.status()["notes"])
            assert line.startswith("d0 cannot read KV of p0, which sends it little: chunk 0 is lost (")
            assert cluster.instances()["p0"]["counters"]["unread_d0"] >= 1

        def decoded() -> str:
            return client.generate([1, 2, 3], max_tokens=2).receipt.decode_instance or ""

        wait_until(lambda: decoded() == "d0", "it is not tried again")
        wait_until(lambda: not _of_d0(client.status()["notes"]), "status still names it")
        cluster.wait_idle()


def _of_d0(notes: list[str]) -> list[str]:
    return [note for note in notes if note.startswith("d0 cannot read")]


def test_the_only_worker_that_cannot_read_ends_requests_by_patience_and_serves_again_when_it_can() -> None:
    pair = "worker=[{iid='p0',role='prefill'},{iid='d0',role='decode'}]"
    with LiveCluster(overrides=[pair, "transfer.cuts=p0>d0@file", "cluster.patience_s=1"]) as cluster:
        client = cluster.client()
        with cut(cluster), pytest.raises(RequestFailed, match="could read KV of p0 for 1 s") as failure:
            client.generate([1, 2, 3], max_tokens=5)
        assert str(failure.value).count("\n") == 0 and "d0: chunk 0 is lost" in str(failure.value)
        assert client.generate([1, 2, 3], max_tokens=5).receipt.attempts == 1
        cluster.wait_idle()
