"""The network as cores name it: what goes wrong with a message is a line in the log, and what comes is in order."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any, cast

import pytest

from tests.core.build import assign, capacity, close, heartbeat, identity
from tetri.core.actions import Step
from tetri.core.worker.worker import Worker
from tetri.executor import Copies
from tetri.net.errors import NetError
from tetri.net.hub import Hub
from tetri.proc.network import HubNetwork, drained, polled, received
from tetri.wire.codec import WireError
from tetri.wire.events import Arrived, PeerDown, PeerUp
from tetri.wire.messages import FlipWanted

WISH = FlipWanted(iid="p0", role="decode", why="idle")


class PlayedHub:
    """Refuses what it is given, if `broken`; `came` is what the next poll gives."""

    def __init__(self, *came: Any, broken: bool = False) -> None:
        self.came, self.broken, self.more = came, broken, False
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


class FullHub(PlayedHub):
    """Each poll reads some 100 messages of a socket that others have filled, which takes `seconds`."""

    def __init__(self, messages: Sequence[Any], seconds: float = 0.0) -> None:
        super().__init__()
        self.waiting, self.seconds, self.now = [Arrived(message) for message in messages], seconds, 7.0
        self.more = True

    def poll(self, timeout: float | None) -> tuple[Any, ...]:
        self.waited.append(timeout)
        self.now += self.seconds
        came, self.waiting = (*self.waiting[:100],), self.waiting[100:]
        self.more = len(came) == 100
        return came

    def read(self, timeout: float | None) -> list[Any]:
        """What a worker reads of it between two steps."""
        return [*drained(cast(Hub, self), timeout, lambda: self.now, 0.2)]


def test_a_worker_reads_all_that_waits_between_two_steps() -> None:
    hub = FullHub(range(1050))
    assert hub.read(1.5) == [*range(1050)] and hub.waited == [1.5] + [0.0] * 10
    assert hub.read(2.5) == [] and hub.waited[-1] == 2.5


def test_but_not_for_longer_than_it_may() -> None:
    hub = FullHub(range(1050), seconds=0.06)
    assert [len(hub.read(1.5)) for _ in range(4)] == [500, 500, 50, 0]


def test_a_close_behind_thousands_of_assigns_takes_effect_before_the_next_step() -> None:
    roomy = capacity(blocks=100, context=400)
    core = Worker(identity("p1", "prefill", capacity=roomy), Random(1), 0.0)
    hub = FullHub([*[assign(f"r{number}", prompt=300) for number in range(4000)], close("r0"), close("r3999")])
    for event in hub.read(None):
        core.handle(event, 0.0)
    (step,) = [action for action in core.tick(0.0) if isinstance(action, Step)]
    assert step.most == 1 and len(core.prefill.requests) == 3998 and core.prefill.expected[0].key == "p:r1:1"


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
