"""What a core heard and said, written down and told again: the format, and that every kind of damage is noticed."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from random import Random

import msgspec
import pytest
from live import EMULATED

from tests.core.build import assign, close, identity
from tests.core.driver import Working
from tests.wire.message_strategies import UNIONS
from tetri.config import load
from tetri.core import actions
from tetri.core.actions import Detokenized, Exported, FromClient, LengthKnown, Send, Submitted
from tetri.core.broker.delivery import Limits
from tetri.cost import Cost
from tetri.engine_request import EngineRequest, HiddenStateEstimate, Sampled, Span, StepDone
from tetri.policy.rules import Rules
from tetri.policy.views import FlipSettings
from tetri.proc.recorder import (
    FULL,
    KINDS,
    MAGIC,
    BrokerStart,
    MonitorStart,
    Recorder,
    RecordError,
    WorkerStart,
    framed,
    full_records,
    raw,
    read,
    recorded,
    value,
)
from tetri.proc.replay import records, replay
from tetri.request import AskedSampling, Expected, LengthDistribution, LengthRange, Sampling
from tetri.wire.clients import EndRequest, Inspect
from tetri.wire.events import PeerUp
from tetri.wire.handover import Handle, LengthUpdate
from tetri.wire.load import Load
from tetri.wire.messages import Close, LoadReport

COST = Cost(prefill=((1.0, 0.01), (512.0, 0.2)), decode=((1.0, 0.01), (32.0, 0.03)))
MONITOR = MonitorStart(flip="idle", settings=FlipSettings(), epoch=3, load_s=0.1, stale_s=1.0, gone_s=5.0, now=10.0)
BROKER = BrokerStart(
    limits=Limits(100, 1000), rules=Rules(), epoch=5, seed=5, now=10.0, model="m", cost=COST, chunk_tokens=8
)
WORKER = WorkerStart(own=identity("p0", "prefill", cost=COST), seed=9, now=10.0)
ODDS = LengthDistribution(4, (0.1, 0.7, 0.2))
LEARNING = WorkerStart(
    own=identity(
        "p1", "prefill", rules=Rules(length="trained", length_granularity=4), expected=Expected("both", ODDS, (0.5,))
    ),
    seed=9,
    now=0.0,
)
HANDLE = Handle(segment="s", slots=[1], generations=[2], block_bytes=32)

VALUES = [
    PeerUp("p0"),
    Submitted(b"\xff\x00", "k", "secret", b"\xfe", "r", (1, 2), AskedSampling(temperature=0.5), 2.0),
    FromClient(b"c", Inspect()),
    FromClient(b"o", EndRequest(rid="r")),
    Detokenized("r", 0, (1,), "é", None, True),
    StepDone((Span("a", 0, 4),), (Sampled("a", (7, 8), "length"),), ("b",), (), (("a", 2),), 2),
    Exported("a", 0, 0, 2, HANDLE, (1 << 64) - 1),
    LengthKnown("a", LengthRange(low=0, high=200)),
    LengthKnown("a", None),
    LengthKnown("a", None, ODDS),
    StepDone(estimates=(HiddenStateEstimate("a", 3, ODDS),)),
    Send("d0", LengthUpdate(src="p0", incarnation=1, rid="r", attempt=1, offer=2, length=LengthRange(low=0, high=4))),
    LoadReport(iid="p0", incarnation=1 << 61, role="prefill", load=Load(free_blocks=-3)),
    actions.AddRequest(EngineRequest("a", "prefill", (1, 2), 2, Sampling())),
    actions.Adopt("a", 0, 0, HANDLE, None, "p0", "shm", ("a",)),
    Send("p0", Close(rid="r", attempt=1)),
]


@pytest.mark.parametrize("made", VALUES, ids=lambda made: type(made).__name__)
def test_a_value_comes_back_as_it_was(made):
    assert value(raw(made)) == made and type(value(raw(made))) is type(made)


def test_every_action_event_and_message_can_be_recorded():
    from typing import get_args

    kinds = [*get_args(actions.Action), *get_args(actions.BrokerInput), *get_args(actions.WorkerInput)]
    kinds += [kind for union in UNIONS.values() for kind in (get_args(union) or (union,))]
    assert {kind.__name__ for kind in kinds} <= set(KINDS)


def test_what_is_no_event_is_refused():
    with pytest.raises(RecordError, match="int is no event"):
        raw(3)
    with pytest.raises(RecordError, match="no event or action called 'Nothing'"):
        value(("Nothing", msgspec.Raw(b"\x80")))


@pytest.mark.parametrize("start", [MONITOR, BROKER, WORKER, LEARNING], ids=lambda start: type(start).__name__)
def test_a_fresh_core_is_made_from_the_file_alone(tmp_path: Path, start):
    Recorder(start.core(), start, tmp_path / "record" / "x.events").close()
    found, calls = read(tmp_path / "record" / "x.events")
    assert found == start and list(calls) == []
    assert type(found.core()) is type(start.core())


def report(iid: str, role: str = "prefill", free: int = 9) -> LoadReport:
    return LoadReport(iid=iid, incarnation=1, role=role, load=Load(free_blocks=free))


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """Of a monitor that heard two instances for a second."""
    path = tmp_path / "monitor.events"
    core, rng = Recorder(MONITOR.core(), MONITOR, path), Random(1)
    for turn in range(20):
        now = 10.0 + turn / 17
        core.handle(report(f"w{turn % 2}", "decode" if turn % 2 else "prefill", rng.randrange(90)), now)
        core.tick(now)
    core.check()  # what is no verb is the core's own
    core.close()
    return path


def test_the_same_events_give_the_same_actions(record: Path):
    made = replay(record)
    assert (made.kind, made.events, made.ticks, made.difference) == ("monitor", 20, 20, None)
    assert made.actions > 10


def test_what_was_learnt_of_lengths_is_learnt_again(tmp_path: Path):
    path = tmp_path / "p1.events"
    told = Working(LEARNING.own, Recorder(LEARNING.core(), LEARNING, path))
    told.later()
    told.meet("d1")
    for turn in range(80):
        rid = f"r{turn}"
        told.tell(assign(rid, prompt=6, max_tokens=20), LengthKnown(f"p:{rid}:1", None, ODDS))
        told.step(estimates={rid: LengthDistribution(4, (0.2, turn / 100, 0.8 - turn / 100))})
        told.tell(close(rid, reason="stop", outputs=1 + turn % 13))
    assert told.heartbeat().predictor.scored == 80
    told.core.close()
    made = replay(path)
    assert made.difference is None and made.actions > 400


def frames(path: Path) -> list[bytes]:
    data, found = path.read_bytes()[len(MAGIC) :], []
    while data:
        size = 4 + int.from_bytes(data[:4], "big")
        found.append(data[4:size])
        data = data[size:]
    return found


def rewrite(path: Path, parts: list[bytes]) -> None:
    path.write_bytes(MAGIC + b"".join(map(framed, parts)))


@pytest.mark.parametrize("change", ["event", "time", "left out", "swapped", "start", "action", "unknown"])
def test_any_change_of_the_record_is_noticed(record: Path, change: str):
    parts = frames(record)
    head, calls = parts[0], [msgspec.msgpack.decode(part) for part in parts[1:]]
    match change:
        case "event":
            calls[4][2][0][1]["load"]["free_blocks"] += 1
        case "time":
            calls[3][1] += 0.2
        case "left out":
            del calls[0]
        case "swapped":
            calls[0], calls[2] = calls[2], calls[0]
        case "start":
            head = head.replace(b"\xa6load_s\xcb?\xb9", b"\xa6load_s\xcb?\xa9")
            assert head != parts[0]
        case "action":
            calls[1][3][0][1]["message"]["number"] += 1
        case "unknown":
            calls[0][2][0][0] = "Nonsense"
    rewrite(record, [head, *map(msgspec.msgpack.encode, calls)])
    made = replay(record)
    assert made.difference is not None and made.difference.startswith("call ")
    if change == "action":
        assert "call 2, tick" in made.difference and "then Publish" in made.difference and "now  " in made.difference


def test_a_record_that_is_cut_off_holds_what_came_before(record: Path):
    data = record.read_bytes()
    record.write_bytes(data[:-3])
    made = replay(record)
    assert made.difference is None and made.events + made.ticks == 39


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "does not begin"),
        (b"tetri-events 2\n", "does not begin"),
        (MAGIC, "cut off at its beginning"),
        (MAGIC + framed(b"\x80"), "no record of a core's events"),
        (MAGIC + b"\xff\xff\xff\xff", "damaged"),
        (MAGIC + framed(msgspec.msgpack.encode(MONITOR)) + framed(b"\x01"), "call 1 cannot be read"),
    ],
)
def test_what_is_no_record_is_one_line(tmp_path: Path, data: bytes, says: str):
    path = tmp_path / "x.events"
    path.write_bytes(data)
    with pytest.raises(RecordError, match=says) as caught:
        replay(path)
    assert "\n" not in str(caught.value)


def test_a_policy_that_this_version_lacks_is_said(tmp_path: Path):
    path = tmp_path / "x.events"
    start = msgspec.structs.replace(MONITOR, flip="none")
    path.write_bytes(MAGIC + framed(msgspec.msgpack.encode(start).replace(b"\xa4none", b"\xa4gone")))
    with pytest.raises(RecordError, match="no core can be made from it"):
        replay(path)


def test_a_disk_that_is_full_ends_the_record_and_not_the_core(tmp_path: Path, monkeypatch, caplog):
    class Full:
        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            pass

    core = Recorder(MONITOR.core(), MONITOR, tmp_path / "x.events")
    core.tick(10.0)
    core._file.close()
    core._file = Full()
    for turn in range(3):
        assert core.handle(report(f"w{turn}"), 10.1)
    assert [entry.getMessage() for entry in caplog.records] == [
        f"{tmp_path}/x.events: nothing more is recorded: No space left on device"
    ]
    assert replay(tmp_path / "x.events").ticks == 1


def test_a_record_ends_at_its_size_and_is_right_up_to_there(tmp_path: Path, caplog):
    core = Recorder(MONITOR.core(), MONITOR, tmp_path / "x.events", 4000)
    for turn in range(200):
        core.handle(report(f"w{turn % 3}"), 10.0 + turn)
    (message,) = caplog.messages
    assert message == f"{tmp_path}/x.events: nothing more is recorded: {FULL}"
    assert 4000 <= (tmp_path / "x.events").stat().st_size < 5000
    made = replay(tmp_path / "x.events")
    assert made.difference is None and 1 < made.events < 200


def test_all_records_of_a_process_count_for_its_size(tmp_path: Path, caplog):
    config = load(EMULATED, [f"cluster.run_dir={tmp_path}", "cluster.record=true", "cluster.record_mib=1"])
    folder = tmp_path / "record"
    folder.mkdir()
    for name, size in {"p0-1": 1 << 19, "p0-2": (1 << 19) - 1, "p01-1": 1 << 20}.items():
        with open(folder / f"{name}.events", "wb") as file:
            file.truncate(size)
    assert full_records(config) == [f"p01 does not record events any more: {FULL}"]
    with ExitStack() as stack:
        core = recorded(MONITOR.core(), MONITOR, config, "p0", 3, stack)
        assert [core.handle(report("w1"), 10.0 + turn) for turn in range(9)] and len(caplog.records) == 1
    assert len(full_records(config)) == 2
    assert replay(folder / f"p0-{3:016x}.events").events == 0
    assert full_records(load(EMULATED, [f"cluster.run_dir={tmp_path}", "cluster.record_mib=1"])) == []


def test_no_records_is_one_line(tmp_path: Path):
    with pytest.raises(RecordError, match=r"cluster\.record=true"):
        records(tmp_path)
    with pytest.raises(RecordError, match="cannot be read"):
        replay(tmp_path / "missing.events")
