"""Messages of hand-overs that get lost, doubled, late, out of order, and come back; all others go through."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tetri.faults import Chance, Faults
from tetri.proc.faulty_network import OVERTAKEN_S, FaultyNetwork
from tetri.wire.handover import Chunk, Drop, Grant, Handle, Landed, Refuse
from tetri.wire.load import Load
from tetri.wire.messages import Close, Heartbeat, Resend

MANY = 200


class Recorder:
    """The network under it: what really left."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, Any]] = []

    def send(self, peer: str, message: Any) -> None:
        self.sent.append((peer, message))

    def publish(self, message: Any) -> None:
        self.sent.append(("everybody", message))

    def connect(self, peer: str, address: str) -> None: ...

    def disconnect(self, peer: str) -> None: ...


class Bench:
    def __init__(self, **faults: float) -> None:
        self.now = 10.0
        self.network = Recorder()
        self.chance = Chance(Faults(**faults), "d0")
        self.bad = FaultyNetwork(self.network, self.chance, lambda: self.now)

    def send(self, count: int = MANY, peer: str = "p0") -> None:
        for number in range(count):
            self.bad.send(peer, landed(number))

    def left(self) -> list[int]:
        return [message.index for _, message in self.network.sent]


def landed(index: int) -> Landed:
    return Landed(src="d0", incarnation=1, rid="r", attempt=1, offer=1, index=index)


def test_drop() -> None:
    bench = Bench(drop=0.3)
    bench.send()
    assert len(bench.left()) == MANY - bench.chance.counts["drop"] < MANY
    assert bench.left() == sorted(set(bench.left())) and bench.bad.due() is None


def test_duplicate() -> None:
    bench = Bench(duplicate=0.3)
    bench.send()
    assert len(bench.left()) == MANY + bench.chance.counts["duplicate"] > MANY
    assert sorted(set(bench.left())) == list(range(MANY))


def test_delay() -> None:
    bench = Bench(delay=0.3, longest=0.5)
    bench.send()
    before, delayed = bench.left(), bench.chance.counts["delay"]
    assert len(before) == MANY - delayed < MANY
    due = bench.bad.due()
    assert due is not None and 10.0 <= due <= 10.5
    bench.now = due - 1e-6
    bench.bad.deliver()
    assert bench.left() == before
    bench.now = 10.5
    bench.bad.deliver()
    assert sorted(bench.left()) == list(range(MANY)) and bench.bad.due() is None


def test_reorder() -> None:
    bench = Bench(reorder=0.3)
    bench.send()
    bench.now += OVERTAKEN_S
    bench.bad.deliver()
    assert sorted(bench.left()) == list(range(MANY)) and bench.bad.due() is None
    swapped = [at for at in range(MANY - 1) if bench.left()[at] > bench.left()[at + 1]]
    assert MANY > len(swapped) >= bench.chance.counts["reorder"] - 1 > 0


def test_reordered_with_nothing_behind_it_it_leaves_all_the_same() -> None:
    bench = Bench(reorder=1.0)
    bench.send(1)
    assert bench.left() == [] and bench.bad.due() == pytest.approx(10.0 + OVERTAKEN_S)
    bench.bad.send("p1", landed(5))  # another peer's does not overtake it
    bench.now += OVERTAKEN_S
    bench.bad.deliver()
    assert bench.network.sent == [("p0", landed(0)), ("p1", landed(5))]


def test_replay() -> None:
    bench = Bench(replay=0.3)
    for number in range(MANY):
        bench.bad.send(f"p{number % 3}", landed(number))
    came = bench.left()
    assert len(came) == MANY + bench.chance.counts["replay"] > MANY
    assert all(peer == f"p{message.index % 3}" for peer, message in bench.network.sent)
    old = [at for at in range(len(came)) if came[at] in came[:at]]
    assert len(old) == bench.chance.counts["replay"]


def test_what_is_no_hand_over_goes_through_and_beats_tell_what_was_injected() -> None:
    everything = dict.fromkeys(("drop", "duplicate", "delay", "reorder", "replay"), 1.0)
    bench = Bench(**everything)
    bench.bad.send("p0", landed(1))
    messages = [Close(rid="r", attempt=1), Resend(rid="r", attempt=1, start=0)]
    for message in messages:
        bench.bad.send("broker", message)
    own = {"iid": "d0", "incarnation": 1, "role": "decode", "load": Load(free_blocks=1)}
    heartbeat = Heartbeat(**own, holds=[], epoch=1, read=1, counters={"late": 2})
    bench.bad.send("broker", heartbeat)
    bench.bad.publish(messages[0])
    assert [message for _, message in bench.network.sent[:2]] == messages
    told = bench.network.sent[2][1]
    assert told.counters == {"late": 2, **bench.chance.counters()} and told.counters["injected_drop"] == 1
    assert heartbeat.counters == {"late": 2} and bench.network.sent[3] == ("everybody", messages[0])


def test_every_message_between_workers_can_be_hit() -> None:
    bench = Bench(drop=1.0)
    names = {"src": "d0", "incarnation": 1, "rid": "r", "attempt": 1, "offer": 1}
    handle = Handle(segment="s", slots=[0], generations=[1], block_bytes=1)
    chunk = Chunk(**names, index=0, start=0, stop=1, handle=handle, digest=1)
    for message in (Grant(**names), Refuse(**names, why="x"), chunk, landed(1), Drop(**names, why="x")):
        bench.bad.send("p0", message)
    assert bench.network.sent == [] and bench.chance.counts["drop"] == 5


def test_polling_wakes_in_time_for_what_is_late() -> None:
    bench, asked = Bench(delay=1.0, longest=1.0), []

    def poll(timeout: float | None) -> Iterator[str]:
        asked.append(timeout)
        bench.now += timeout or 0.0
        yield "heard"

    assert list(bench.bad.received(poll, 3.0)) == ["heard"] and asked == [3.0]
    bench.send(1)
    assert list(bench.bad.received(poll, None)) == ["heard"]
    assert 0.0 < asked[1] <= 1.0 and bench.left() == [0]
