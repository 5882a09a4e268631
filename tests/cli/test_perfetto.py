"""A trace of requests, by Chrome's format and in Perfetto's own trace processor."""

import msgspec
import pytest
from observed import EVENTS, event, timeline

from tests.cli.trace_processor import query
from tetri.cli.perfetto import trace
from tetri.wire.observation import Timeline


def typed(**fields):
    return msgspec.convert(timeline(**fields), Timeline)


def of(found, **wanted):
    return [each for each in found["traceEvents"] if all(each.get(key) == value for key, value in wanted.items())]


def names(found):
    """(process, thread) of each track."""
    processes = {each["pid"]: each["args"]["name"] for each in of(found, name="process_name")}
    threads = of(found, name="thread_name")
    return {each["tid"]: (processes[each["pid"]], each["args"]["name"]) for each in threads}


def test_there_is_a_slice_for_each_stage_step_chunk_and_transfer_on_the_track_of_its_instance():
    found = trace([(100.0, typed())])
    tracks = names(found)
    slices = [(*tracks[each["tid"]], each["name"], each["ts"], each["dur"]) for each in of(found, ph="X")]
    assert sorted(each for each in slices if each[1] == "r1") == [
        *[("d0", "r1", "decode", 500e3, 500e3), ("d1", "r1", "decode", 1500e3, 500e3)],
        *[("p0", "r1", "prefill", 100e3, 400e3), ("p0", "r1", "prefill", 1250e3, 250e3)],
        *[("p0", "r1", "queued", 0.0, 100e3), ("p0", "r1", "queued", 1000e3, 250e3)],
    ]
    assert [each[0] for each in slices if each[2] == "step"] == ["p0", "d0", "d0", "d1", "d1"]
    assert [each[2:] for each in slices if each[1] == "r1 chunks" and each[0] == "p0"] == [
        *[("chunk", 150e3, 100e3), ("chunk", 400e3, 100e3)]
    ]
    assert [each[1:3] for each in slices if each[0] == "d0" and "KV" in each[1]] == [
        *[("r1 KV", "fetch"), ("r1 KV 2", "fetch")]  # these overlap
    ]
    assert {each["name"] for each in of(found, ph="i")} == {
        *("deferred", "refused", "offered", "granted", "retry", "migrated", "preempted")
    }
    retry = of(found, name="retry")[0]
    assert tracks[retry["tid"]][0] == "broker" and retry["ts"] == 1e6 and retry["args"]["what"].endswith("d0 was lost")


def test_arrows_go_where_a_choice_goes_on_at_another_instance():
    found = trace([(100.0, typed())])
    tracks = names(found)
    arrows = [(each["ph"], each["id"], tracks[each["tid"]][0]) for each in of(found, cat="flow")]
    assert arrows == [*[("s", 1, "p0"), ("f", 1, "d0"), ("s", 2, "d0"), ("f", 2, "p0"), ("s", 3, "p0"), ("f", 3, "d1")]]


def test_requests_share_one_axis_which_begins_with_the_first_arrival():
    first, second = typed(age_s=30.0), typed(rid="r2", age_s=10.0)
    found = trace([(100.0, first), (100.5, second)])
    starts = {each["args"]["request"]: each["ts"] for each in reversed(of(found, cat="stage"))}
    assert starts == {"r1": 0.0, "r2": 20.5e6} and trace([])["traceEvents"] == []


def test_slices_of_one_thread_do_not_overlap_though_clocks_differ_a_little():
    steps = [[0.5, 0.1, "d0", 1, 1, 0, 1], [0.5999, 0.1, "d0", 1, 1, 0, 1], [0.6, 0.05, "d0", 1, 1, 0, 1]]
    ends = 0.0
    for each in of(trace([(0.0, typed(steps=steps))]), name="step"):
        assert each["ts"] >= ends and each["dur"] >= 0
        ends = each["ts"] + each["dur"]


@pytest.mark.timeout(120)
def test_perfettos_trace_processor_reads_all_of_it():
    more = typed(rid="r2", events=[*EVENTS, event("fetch", 1.3, "d1", 0.1, first=0, last=32, size=10, note="shm")])
    found = trace([(100.0, typed()), (103.0, more)])
    columns = "process.name as iid, thread.name as thread, slice.name as slice, slice.ts as ts, slice.dur as dur"
    joins = "join thread_track on slice.track_id = thread_track.id join thread using(utid) join process using(upid)"
    lost, slices, flows = query(
        found,
        "select name, value from stats where severity in ('error', 'data_loss') and value > 0",
        f"select {columns} from slice {joins}",
        "select count(*) from flow",
    )
    tracks = names(found)
    expected = [
        (*tracks[each["tid"]], each["name"], round(1e3 * each["ts"]), round(1e3 * each.get("dur", 0)))
        for each in found["traceEvents"]
        if each["ph"] in "Xi"
    ]
    assert lost == [] and sorted(slices) == sorted(expected) and flows == [(6,)]
    steps, chunks = (sum(row[2] == name for row in slices) for name in ("step", "chunk"))
    assert (steps, chunks) == (2 * len(timeline()["steps"]), 2 * sum(each[0] == "chunk" for each in EVENTS))
