"""The messages of the live stream."""

import json

from observations import observation, worker

from tetri import __version__
from tetri.core.broker.history import MOVES
from tetri.proc.gateway.frames import Frames
from tetri.proc.gateway.history import History


def move(rid, stage="queued", age_s=0.0):
    return [rid, stage, "p0", age_s, 1, 0]


def ended(rid, age_s=0.0):
    return {"rid": rid, "reason": "stop", "age_s": age_s, "ttft_s": 0.5}


class Seconds:
    """Frames that are fed once a second."""

    def __init__(self):
        self.history, self.now = History(), 0.0
        self.frames = Frames(self.history)

    def pass_(self, *instances, seconds=1.0, **given):
        self.now += seconds
        found = observation(*instances, **given)
        self.history.advance(found, self.now, 1000 + self.now)
        self.frames.observed(found, self.now, 1000 + self.now)
        return self

    def read(self, seen=None):
        data, seen = self.frames.of(seen)
        assert data.startswith(b"data: ") and data.endswith(b"\n\n") and data.count(b"\n") == 2
        return json.loads(data[6:]), seen


def test_the_first_message_has_all_that_is_kept():
    seconds = Seconds().pass_(happened={"moves": [move("a", age_s=0.5)], "events": [["joined", "p0", 0.25, "x"]]})
    seconds.pass_(happened={"moves": [move("b")], "ended": [ended("a")]}, notes=["slow"], requests={"queued": 1})
    found, _ = seconds.read()
    assert found["moves"] == [move("a", age_s=1.5), move("b")] and found["ended"] == [ended("a")]
    assert found["events"] == [["joined", "p0", 1.25, "x"]] and found["missed"] == 0
    assert [point["at"] for point in found["history"]] == [1002.0] and found["point"] == found["history"][-1]
    assert (found["epoch"], found["now"], found["version"], found["model"]) == (1, 1002.0, __version__, "m")
    assert (found["notes"], found["requests"], found["monitor"]) == (["slow"], {"queued": 1}, None)


def test_later_messages_have_what_is_new():
    seconds = Seconds().pass_(happened={"moves": [move("a")]})
    _, seen = seconds.read()
    found, seen = seconds.pass_(happened={"moves": [move("b")], "ended": [ended("a")]}).read(seen)
    assert (found["moves"], found["ended"], found["events"]) == ([move("b")], [ended("a")], [])
    assert found["point"]["at"] == 1002.0 and found["missed"] == 0 and "history" not in found
    seconds.frames.observed(observation(), seconds.now + 0.2, 1002.2)
    found, _ = seconds.read(seen)
    assert found["point"] is None and found["moves"] == [] and found["now"] == 1002.2


def test_who_reads_slowly_gets_all_that_is_kept_since_then():
    seconds = Seconds().pass_()
    _, seen = seconds.read()
    seconds.pass_(happened={"moves": [move(str(n)) for n in range(MOVES)]})
    found, _ = seconds.pass_(happened={"moves": [move("x"), move("y")], "missed": 3}).read(seen)
    assert len(found["moves"]) == MOVES and found["moves"][-1] == move("y")
    assert found["missed"] == 2 + 3 and found["point"]["at"] == 1003.0


def test_each_message_is_encoded_once():
    seconds = Seconds().pass_()
    (first, seen), (again, _) = seconds.frames.of(None), seconds.frames.of(None)
    assert first is again
    seconds.pass_()
    assert seconds.frames.of(seen)[0] is seconds.frames.of(seen)[0]


def test_what_an_instance_shows():
    loaded = {
        "free_blocks": 3,
        "queued": 1,
        "queued_tokens": 9,
        "queued_s": 0.5,
        "waiting": 2,
        "landed": 1,
        "running": 4,
    }
    before = worker("d0", chunk_space=0, received={"shm": 100})
    now = worker(
        *("d0", "mixed", {**loaded, "heavy": 1, "busy": 0.75}, {"shm": 350}),
        **{"chunk_space": 8, "chunk_tokens": 2, "decode_steps": 1, "decode_tokens": 4, "note": "n", "state": "lost"},
        step_ratio={"prefill": None, "decode": 1.25},
    )
    found, _ = Seconds().pass_(before).pass_(now).read()
    del loaded["free_blocks"]
    assert found["instances"] == [
        {
            **{
                "iid": "d0",
                "role": "mixed",
                "keeps": "",
                "state": "lost",
                "note": "n",
                "blocks": 9,
                "free": 3,
                **loaded,
                "heavy": 1,
            },
            **{"busy": 0.75, "fill": 0.25, "batch": 4.0, "received_bytes_s": 250},
            "ratio": {"prefill": None, "decode": 1.25},
        }
    ]


def test_an_instance_that_needs_more_memory_than_it_has_shows_none():
    found, _ = Seconds().pass_(worker(load={"free_blocks": -2})).read()
    assert found["instances"][0]["free"] == 0


def test_a_broker_that_is_away_is_named_and_the_rest_stays():
    seconds = Seconds()
    seconds.frames.missed("away", 0.5, 1000.5)
    found, _ = seconds.read()
    assert (found["notes"], found["instances"], found["epoch"]) == (["away"], [], 0)
    seconds.pass_(worker("p0"), notes=["slow"])
    seconds.frames.missed("away", 9.0, 1009.0)
    found, _ = seconds.read()
    assert found["notes"] == ["away", "slow"] and found["now"] == 1009.0
    assert [each["iid"] for each in found["instances"]] == ["p0"]
    found, _ = seconds.pass_(notes=["slow"]).read()
    assert found["notes"] == ["slow"]


def test_a_broker_that_starts_again_knows_no_request_of_before():
    seconds = Seconds().pass_(
        happened={"moves": [move("a")], "ended": [ended("b")], "events": [["lost", "p0", 0.0, ""]]}
    )
    _, seen = seconds.read()
    seconds.pass_(epoch=2, happened={"moves": [move("c")], "events": [["joined", "p0", 0.0, ""]]})
    found, _ = seconds.read()
    assert found["epoch"] == 2 and found["moves"] == [move("c")] and found["ended"] == []
    assert [event[0] for event in found["events"]] == ["lost", "joined"]
    assert seconds.read(seen)[0]["moves"] == [move("c")]
