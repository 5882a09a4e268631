"""What status and top show of an instance."""

import msgspec
from fake_broker import instance

from tetri.cli import columns
from tetri.cli.columns import cells, counted, meanings
from tetri.wire.clients import InstanceStatus
from tetri.wire.load import Load
from tetri.wire.observation import Activity


def test_a_cell_tells_of_the_load_and_of_the_steps_since_the_start_or_of_the_last_seconds():
    whole = Activity(chunk_tokens=50, chunk_space=100, decode_steps=10, decode_tokens=25)
    load = Load(free_blocks=3, queued=2, queued_s=0.25, waiting=1, running=4, heavy=3, busy=0.5)
    fields = {"blocks": 12, "load": msgspec.to_builtins(load), "activity": msgspec.to_builtins(whole)}
    fields |= {"step_ratio": {"prefill": 1.5, "decode": None}, "paths": {"shm": 2}}
    found = msgspec.convert(instance("m0", "mixed", **fields), InstanceStatus)
    expected = {
        **{columns.INSTANCE: "m0", columns.QUEUED: "2", columns.QUEUE_TIME: "250.0 ms", columns.FILL: "50%"},
        **{columns.WAITING: "1", columns.RUNNING: "4", columns.HEAVY: "3", columns.BATCH: "2.5"},
        **{columns.KV_USED: "75%", columns.BUSY: "50%", columns.RATIO: "prefill 1.50", columns.KV: "shm 2"},
        **{columns.PREFILL_RATIO: "1.50", columns.DECODE_RATIO: "-"},
    }
    assert cells([*expected], found) == [*expected.values()]
    assert cells([columns.ROLE], found) == ["mixed"]
    assert cells([columns.ROLE], found.changed(role="auto", keeps="prefill")) == ["auto (prefill)"]
    recent = Activity(chunk_tokens=9, chunk_space=10)
    assert cells([columns.FILL, columns.BATCH], found, recent) == ["90%", "-"]


def test_the_help_explains_every_title_that_is_not_plain():
    plain = {"instance", "role", "state", "note"}
    titles = {each.title for each in vars(columns).values() if isinstance(each, columns.Column)}
    assert {column.title for column in columns.MEANING} == titles - plain
    shown = meanings([columns.HEAVY, columns.ROLE])
    assert "heavy" in shown and "waiting and running" in shown and "role" not in shown
    assert counted({"a": 1, "b": 2}) == "a 1, b 2"
