"""Instances that change their role while requests are served: by hand, by the monitor's watcher, and without a monitor.

What a flip takes is counted by the broker, from the wish to the worker's answer. A worker reads its messages between
two engine steps, so the step that it is in is part of that; here steps take 2 to 4 ms, so that it can be told from a
drain, which would take as long as the requests there: hundreds of milliseconds. The record tells the flip alone.
"""

from __future__ import annotations

import statistics
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from live import LiveCluster, wait_until
from raw_client import RawClient
from traffic import Pressure, flip_seconds

# Each of them leaves both roles served; the last ones put back what was.
FLIPS = [
    ("p0", "decode"),
    ("d0", "prefill"),
    ("p0", "mixed"),
    ("d0", "mixed"),
    ("p1", "decode"),
    ("d1", "prefill"),
    ("p1", "prefill"),
    ("d1", "decode"),
    ("p0", "prefill"),
    ("d0", "decode"),
]


@contextmanager
def brisk_cluster(*overrides: str) -> Iterator[LiveCluster]:
    """Two prefill and two decode workers whose steps take 2 to 4 ms."""
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as table:
        table.write("prefill = [[1, 0.002], [256, 0.003]]\ndecode = [[1, 0.002], [32, 0.003]]\n")
        table.flush()
        with LiveCluster(overrides=[f"engine.cost={table.name}", "engine.chunk_tokens=256", *overrides]) as cluster:
            yield cluster


def flip(cluster: LiveCluster, iid: str, role: str) -> dict[str, Any]:
    """By a client that is not tetri's own."""
    with RawClient(cluster.config.operators_address) as client:
        key = uuid.uuid4().hex
        client.send("change_role", key=key, iid=iid, role=role)
        return client.receive(key=key)


def monitor(cluster: LiveCluster) -> dict[str, Any]:
    found = cluster.client().status()["monitor"]
    return found if found is not None else {"number": 0, "age_s": float("inf"), "flip": ""}


@pytest.fixture(scope="module")
def cluster() -> Iterator[LiveCluster]:
    with brisk_cluster("cluster.record=true") as cluster:
        yield cluster


def test_ten_flips_under_load(cluster: LiveCluster) -> None:
    """No request fails or changes, and each flip takes milliseconds."""
    took: list[float] = []
    pressure = Pressure(cluster)

    def disturb() -> None:
        pressure.more(12)
        for iid, role in FLIPS:
            changed = flip(cluster, iid, role)
            assert changed["type"] == "role_changed" and changed["role"] == role != changed["was"]
            assert cluster.roles()[iid] == role
            took.append(changed["took_s"])
            pressure.more(6)

    results = pressure.run(disturb)
    alone = flip_seconds(cluster)
    print(f"{len(results)} requests; flips took", [f"{1000 * t:.1f} ms" for t in took])
    print("without the step before", [f"{1000 * t:.1f} ms" for t in alone])
    assert len(alone) == len(FLIPS)
    # Other processes of a busy machine make some of them longer, and the requests too, which a drain would wait for.
    served = statistics.median(result.jct_s for result in results)
    assert statistics.median(alone) < served / 4 and statistics.median(took) < served / 2
    assert all(result.receipt.attempts == 1 for result in results)
    used = {(r.receipt.prefill_instance, r.receipt.decode_instance) for r in results}
    assert len({prefill for prefill, _ in used}) >= 3 and len({decode for _, decode in used}) >= 3


def test_the_monitor_is_killed_under_load_and_comes_back(cluster: LiveCluster) -> None:
    """Requests go on, status says how old the view is, and views go on when it is back."""
    pressure = Pressure(cluster)

    def disturb() -> None:
        pressure.more(12)
        wait_until(lambda: monitor(cluster)["age_s"] < 0.5, "no views")
        cluster.kill("monitor")
        last = monitor(cluster)["number"]
        pressure.more(24)
        wait_until(lambda: monitor(cluster)["age_s"] > 0.5, "the view's age does not grow")
        assert monitor(cluster)["number"] >= last
        assert flip(cluster, "d1", "mixed")["type"] == "role_changed"  # needs no monitor
        cluster.start("monitor")
        wait_until(lambda: monitor(cluster)["age_s"] < 0.5, "no views of the new one")
        assert flip(cluster, "d1", "decode")["type"] == "role_changed"
        pressure.more(12)

    assert all(result.receipt.attempts == 1 for result in pressure.run(disturb))


def test_the_watcher_flips_where_the_work_is() -> None:
    """Long prompts and hardly any output: decode instances become prefill ones, and nobody's request is lost."""
    settings = ["idle_s=0.3", "hold_s=0.5", "gain=1.5", "load_ms=20", "flip=balance"]
    with brisk_cluster(*(f"monitor.{setting}" for setting in settings), "emulated.time_scale=8") as cluster:
        pressure = Pressure(cluster, width=20, prompt=2500, output=2)

        def disturb() -> None:
            wait_until(lambda: list(cluster.roles().values()).count("prefill") == 3, "nobody flips")
            pressure.more(6)
            assert sum(role in ("decode", "mixed") for role in cluster.roles().values()) >= 1  # the floor
            assert monitor(cluster)["flip"] == "balance"

        results = pressure.run(disturb)
        assert {result.receipt.prefill_instance for result in results} & {"d0", "d1"}
        assert "should become prefill" in cluster.log("monitor")
