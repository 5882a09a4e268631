"""A deployment without a model behind an HTTP gateway, for tests that know its URL and nothing else of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
from live import LiveCluster, wait_until

KEY = "a-key-for-tests"
MOST_OPEN = 16
SETTINGS = ["engine.cost=cpu-smollm2.toml", "emulated.time_scale=0.2", f"broker.max_open={MOST_OPEN}"]


class Server(NamedTuple):
    """`url` of the gateway, without a path, and the `key` that it wants; `wait_open` waits until the broker has so many
    open requests."""

    url: str
    key: str
    wait_open: Callable[[int], None]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    prologue = f"import os; os.environ['TETRI_API_KEY'] = '{KEY}'; "
    with LiveCluster(overrides=SETTINGS, prologue=prologue) as cluster:
        url = cluster.start_gateway()
        client = cluster.client()

        def wait_open(count: int) -> None:
            wait_until(lambda: sum(client.status()["requests"].values()) == count, f"not {count} requests are open")

        yield Server(url, KEY, wait_open)
        cluster.wait_idle()
