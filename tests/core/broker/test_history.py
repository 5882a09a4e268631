"""What has happened lately, and since when."""

import pytest

from tetri.core.broker.history import ENDS, EVENTS, MOVES, History
from tetri.request import Receipt, Slo, Stage, Usage
from tetri.wire.clients import Done
from tetri.wire.observation import ClusterEvent, Ended, Move

DONE = Done(
    rid="r1",
    reason="stop",
    usage=Usage(prompt_tokens=8, completion_tokens=5),
    timeline={},
    ttft_s=0.5,
    jct_s=2.5,
    receipt=Receipt(prompt_tokens=8, attempts=2),
    slo=Slo(tpot_s=0.25),
    slo_result="tpot",
)


def test_it_tells_all_since_a_serial_with_its_age():
    history = History()
    history.moved("r1", Stage.QUEUED, "p1", 1, 0, 10.0)
    first = history.serial
    history.happened("lost", "p1", "silent", 11.0)
    history.ended("r1", DONE, 0.5, "p1", "d1", 12.0)
    history.moved("r1", Stage.DONE, "", 2, 5, 12.0)
    found = history.since(first, 13.0)
    ended = {"ttft_s": 0.5, "tpot_s": 0.5, "jct_s": 2.5, "prompt_tokens": 8, "outputs": 5, "attempts": 2}
    ended |= {"slo": Slo(tpot_s=0.25), "slo_result": "tpot"}
    assert found.moves == [Move("r1", Stage.DONE, "", 1.0, 2, 5)]
    assert found.ended == [Ended(rid="r1", reason="stop", age_s=1.0, prefill="p1", decode="d1", **ended)]
    assert found.events == [ClusterEvent("lost", "p1", 2.0, "silent")]
    assert found.missed == 0
    assert history.since(0, 13.0).moves[0] == Move("r1", Stage.QUEUED, "p1", 3.0, 1, 0)
    nothing = history.since(history.serial, 13.0)
    assert (nothing.moves, nothing.ended, nothing.events, nothing.missed) == ([], [], [], 0)


@pytest.mark.parametrize("kind", ["moves", "ended", "events"])
def test_the_newest_are_kept_and_the_others_are_missed(kind):
    history, most = History(), {"moves": MOVES, "ended": ENDS, "events": EVENTS}[kind]
    history.happened("joined", "p1", "", 0.0)
    since = history.serial
    add = {
        "moves": lambda at: history.moved("r1", Stage.QUEUED, "p1", 1, 0, at),
        "ended": lambda at: history.ended("r1", DONE, None, "p1", "d1", at),
        "events": lambda at: history.happened("lost", "p1", "", at),
    }[kind]
    for number in range(most + 5):
        add(float(number))
    found = history.since(since, most + 5.0)
    ages = [getattr(each, "age_s", None) for each in getattr(found, kind)]
    assert ages == [float(age) for age in range(most, 0, -1)]  # oldest first
    assert found.missed == 5
    assert history.since(0, 0.0).missed == 0  # who has seen nothing has missed nothing
