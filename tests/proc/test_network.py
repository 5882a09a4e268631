"""The network as cores name it: what goes wrong with a message is a line in the log, and what comes is in order."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import pytest

from tests.core.build import heartbeat
from tetri.executor import Copies
from tetri.net.errors import NetError
from tetri.net.hub import Hub
from tetri.proc.network import HubNetwork, polled, received
from tetri.wire.codec import WireError
from tetri.wire.events import Arrived, PeerDown, PeerUp
from tetri.wire.messages import FlipWanted

WISH = FlipWanted(iid="p0", role="decode", why="idle")


class PlayedHub:
    """Refuses what it is given, if `broken`; `came` is what the next poll gives."""

    def __init__(self, *came: Any, broken: bool = False) -> None:
        self.came, self.broken = came, broken
        self.unsent: Counter[str] = Counter()
        self.counters: Counter[str] = Counter()
        self.done: list[tuple[Any, ...]] = []
        self.waited: list[float | None] = []

    def send(self, *what: Any) -> None:
        self._do(WireError("garbage", "too long"), "send", *what)

    def publish(self, *what: Any) -> None:
        self._do(WireError("garbage", "too long"), "publish", *what)

    def connect(self, *what: Any) -> None:
        self._do(NetError("no such address"), "connect", *what)

    def disconnect(self, *what: Any) -> None:
        self.done.append(("disconnect", *what))

    def _do(self, error: Exception, *what: Any) -> None:
        if self.broken:
            raise error
        self.done.append(what)

    def poll(self, timeout: float | None) -> tuple[Any, ...]:
        self.waited.append(timeout)
        return self.came


def use(hub: PlayedHub) -> None:
    network = HubNetwork(cast(Hub, hub), logging.getLogger("test"))
    network.connect("p0", "at p0")
    network.send("p0", WISH)
    network.publish(WISH)
    network.disconnect("p0")


def test_what_a_core_does_the_hub_does() -> None:
    hub = PlayedHub()
    use(hub)
    assert hub.done == [("connect", "p0", "at p0"), ("send", "p0", WISH), ("publish", WISH), ("disconnect", "p0")]


def test_what_the_hub_cannot_do_is_logged_and_raises_nothing(caplog: pytest.LogCaptureFixture) -> None:
    use(PlayedHub(broken=True))
    assert len(caplog.records) == 3 and all(record.levelname == "ERROR" for record in caplog.records)
    assert "no such address" in caplog.text and caplog.text.count("too long") == 2 and caplog.text.count("p0") >= 2


def test_what_happened_to_a_workers_slab_is_in_its_heartbeats_and_once_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    hub, counters = PlayedHub(), dict[str, int]()
    network = HubNetwork(cast(Hub, hub), logging.getLogger("test"), lambda: counters)
    beat = heartbeat("p0", counters={"late": 2})
    network.send("broker", beat)
    counters["segment_unlinked"] = 1
    for message in (beat, WISH, beat):
        network.send("broker", message)
    noted = beat.changed(counters={"late": 2, "segment_unlinked": 1})
    assert [message for _, _, message in hub.done] == [beat, noted, WISH, noted]
    assert caplog.text.count("segment_unlinked") == 1


def test_messages_come_without_their_envelope() -> None:
    hub = PlayedHub(PeerUp("p0"), Arrived(WISH), PeerDown("p0"))
    assert [*polled(cast(Hub, hub), 1.5)] == [PeerUp("p0"), WISH, PeerDown("p0")] and hub.waited == [1.5]


class PlayedCopies:
    def __init__(self, at: float | None) -> None:
        self.at = at

    def due(self) -> float | None:
        return self.at

    def events(self) -> Iterator[str]:
        yield "kv"


@pytest.mark.parametrize(
    ("due", "timeout", "waits"),
    [(None, None, None), (None, 2.0, 2.0), (0.0, None, 0.0), (0.0, 2.0, 0.0), (float("inf"), 2.0, 2.0)],
)
def test_a_worker_reads_messages_then_kv_then_the_rest(
    due: float | None, timeout: float | None, waits: float | None
) -> None:
    """And it waits no longer than until its store has something to do."""
    hub, copies = PlayedHub(Arrived(WISH)), cast(Copies, PlayedCopies(due))
    others = [lambda: iter(["length"]), lambda: iter(["more"])]
    assert [*received(cast(Hub, hub), copies, others, timeout)] == [WISH, "kv", "length", "more"]
    assert hub.waited == [waits]


def test_a_heartbeat_says_what_could_not_be_sent_or_read() -> None:
    hub = PlayedHub()
    hub.unsent, hub.counters = Counter(full_d0=2), Counter(sent=5, garbage_frames=1)
    network = HubNetwork(cast(Hub, hub), logging.getLogger("test"), lambda: {"stream_read_cut": 3})
    network.send("broker", heartbeat("p0", counters={"late": 1}))
    network.send("broker", WISH)
    (_, _, beat), (_, _, wish) = hub.done
    counted = {"late": 1, "unsent_full_d0": 2, "garbage_frames": 1, "stream_read_cut": 3}
    assert beat.counters == counted and wish == WISH
