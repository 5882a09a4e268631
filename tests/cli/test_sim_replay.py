"""tetri-cli sim replay: what it prints and its exit status."""

import json
from functools import partial

import msgspec
import pytest

from tetri.policy.views import FlipSettings
from tetri.proc.recorder import MAGIC, MonitorStart, Recorder, framed
from tetri.wire.load import Load
from tetri.wire.messages import LoadReport

START = MonitorStart(flip="none", settings=FlipSettings(), epoch=1, load_s=0.1, stale_s=1.0, gone_s=5.0, now=0.0)


@pytest.fixture
def run(run):
    return partial(run, "sim", "replay")


@pytest.fixture
def folder(tmp_path):
    core = Recorder(START.core(), START, tmp_path / "record" / "monitor-1.events")
    core.handle(LoadReport(iid="p0", incarnation=1, role="prefill", load=Load(free_blocks=3)), 0.05)
    core.tick(0.2)
    core.close()
    return tmp_path


def test_the_same_actions(run, folder):
    assert run(folder) == (0, "monitor-1: monitor, 1 events, 1 ticks, 2 actions: same\n", "")
    status, out, _ = run(folder / "record", "--json")
    made = json.loads(out)
    assert status == 0 and made["same"] is True and (made["events"], made["ticks"], made["actions"]) == (1, 1, 2)


def test_other_actions_are_an_exit_status_and_the_first_difference(run, folder):
    path = folder / "record" / "monitor-1.events"
    start = msgspec.structs.replace(START, epoch=2)
    old, new = framed(msgspec.msgpack.encode(START)), framed(msgspec.msgpack.encode(start))
    path.write_bytes(path.read_bytes().replace(MAGIC + old, MAGIC + new))
    status, out, _ = run(folder)
    assert status == 1 and "monitor-1: monitor, 1 events, 0 ticks, 1 actions: DIFFERENT\n" in out
    assert "call 1, handle LoadReport at 0.050000: action 1\n  then Publish" in out
    assert json.loads(run(folder, "--json")[1])["same"] is False


def test_no_record_is_one_line(run, tmp_path):
    for says in ("cluster.record=true", "does not begin as a record"):
        status, out, err = run(tmp_path)
        assert (status, out, err.count("\n")) == (2, "", 1) and says in err
        (tmp_path / "x.events").write_bytes(b"junk")
