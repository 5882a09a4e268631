"""Readiness of a live cluster: it names the pair whose KV path is broken, and only while it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from live import LiveCluster, wait_until

from tetri.client import Client

WORKERS = "worker=[{iid='p0', role='prefill'}, {iid='d0', role='decode'}, {iid='d1', role='decode'}]"
PROMPTS = [[1, 2, number] for number in range(16)]


@contextlib.contextmanager
def cut(cluster: LiveCluster) -> Iterator[None]:
    """The cuts of the configuration ("@file") are in force."""
    file = cluster.folder / "cut"
    file.touch()
    yield
    file.unlink()


def broken(client: Client) -> dict[str, str]:
    found = client.readiness()
    assert found["ready"] == (not found["why"]) and found["in_service"] == len(found["pairs"]) == 2
    return {f"{each['prefill']}>{each['decode']}": each["why"] for each in found["pairs"] if each["state"] == "broken"}


def test_it_names_the_pair_whose_path_is_broken_and_only_while_it_is() -> None:
    with LiveCluster(overrides=[WORKERS, "transfer.cuts=p0>d1@file"]) as cluster:
        client = cluster.client()
        with cut(cluster):  # without traffic: canaries find it
            wait_until(lambda: list(broken(client)) == ["p0>d1"], "no canary finds the broken path")
        wait_until(lambda: client.readiness()["ready"], "it is not ready although all paths work")
        assert {each["state"] for each in client.readiness()["pairs"]} == {"carried"}
        status = client.status()
        assert status["requests"] == {} and not any(
            "ended" in name or name == "accepted" for name in status["counters"]
        )
        with cut(cluster):  # traffic finds it, and goes on over the other pair
            results = cluster.answers(PROMPTS, max_tokens=3)
            assert {result.receipt.decode_instance for result in results} == {"d0"}
            wait_until(lambda: list(broken(client)) == ["p0>d1"], "traffic does not show the broken path")
            assert not client.readiness()["ready"] and "chunk 0 is lost" in broken(client)["p0>d1"]
        wait_until(lambda: client.readiness()["ready"], "it is not ready again")
        cluster.wait_idle()
