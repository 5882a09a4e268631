"""Whatever strangers send to the monitor, or say in its or a worker's name: requests are served, views go on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import zmq
from live import LiveCluster, wait_until

from tetri.wire import codec
from tetri.wire.load import Load
from tetri.wire.messages import Close, Flip, FlipWanted, LoadReport


@pytest.fixture(scope="module")
def cluster() -> Iterator[LiveCluster]:
    with LiveCluster(overrides=["monitor.load_ms=20"]) as cluster:
        yield cluster
        cluster.wait_idle()
        assert cluster.roles() == {"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode"}


def views_go_on(cluster: LiveCluster) -> None:
    client = cluster.client()
    wait_until(lambda: client.status()["monitor"] is not None, "no view")  # the broker connects when the monitor is up
    before = client.status()["monitor"]["number"]
    wait_until(lambda: client.status()["monitor"]["number"] >= before + 5, "no more views")
    assert client.generate("still there?", max_tokens=8).finish_reason == "length"
    cluster.assert_alive()


@contextlib.contextmanager
def publisher(address: str) -> Iterator[zmq.Socket[bytes]]:
    """A stranger whom the monitor hears: it has subscribed to it."""
    context = zmq.Context()
    made = context.socket(zmq.XPUB)
    made.linger, made.sndhwm = 2000, 100_000
    made.connect(address)
    assert made.poll(5000) and made.recv() == b"\x01"
    try:
        yield made
    finally:
        made.close()
        context.term()


def test_made_up_loads_and_wishes_harm_nobody(cluster: LiveCluster) -> None:
    """Instances that do not exist, numbers that cannot be, roles that are none, flips of nobody."""
    loads = [
        Load(free_blocks=-5),
        Load(free_blocks=1 << 62, queued=1 << 60, queued_s=float("inf"), decode_s=float("nan"), busy=float("nan")),
    ]
    reports = [
        LoadReport(iid=iid, incarnation=3, role=role, load=load)
        for iid in ("ghost", "", "x" * 128)
        for role in ("prefill", "decode", "mixed", "nonsense")
        for load in loads
    ]
    with publisher(cluster.config.loads_address) as incompatibility:
        for report in reports:
            incompatibility.send(codec.encode(report))
    wishes = [("ghost", "decode"), ("p0", "nonsense"), ("", ""), ("p0", "prefill")]
    context = zmq.Context()
    events, inbox = context.socket(zmq.PUSH), context.socket(zmq.PUSH)
    events.connect(cluster.config.events_address)
    inbox.connect(cluster.config.inbox_address("p0"))
    for iid, role in wishes:
        events.send(codec.encode(FlipWanted(iid=iid, role=role, why="so")))
    inbox.send(codec.encode(Flip(role="nonsense", number=1)))
    inbox.send(codec.encode(Close(rid="nobody", attempt=1)))
    for made in (events, inbox):
        made.close(2000)
    context.term()
    views_go_on(cluster)


def test_a_flood_of_loads_holds_nobody_up(cluster: LiveCluster) -> None:
    report = codec.encode(LoadReport(iid="flood", incarnation=1, role="decode", load=Load(free_blocks=1)))
    stream = cluster.client().stream([5] * 900, max_tokens=200)
    with publisher(cluster.config.loads_address) as incompatibility:
        incompatibility.linger = 0
        for _ in range(20_000):
            with contextlib.suppress(zmq.Again):
                incompatibility.send(report, zmq.NOBLOCK)
    assert stream.wait().finish_reason == "length"
    views_go_on(cluster)
