"""What a Status says about a degraded cluster."""

import pytest

from tests.core.broker.serving import serving
from tests.core.build import fingerprint, heartbeat, ready
from tetri.request import PredictorStatus, StepRatio
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.load import Load
from tetri.wire.messages import ClusterView

NO_MONITOR = "requests are placed without load reports, and no instance flips by itself"


@pytest.fixture
def served():
    told = serving("p1", "d1")
    told.tell(ClusterView(epoch=1, number=7, loads=[]))
    return told


def test_of_a_cluster_that_works_there_is_none(served):
    assert served.status().notes == []


def test_a_silent_monitor_is_named_with_the_consequence(served):
    served.now = 7.5
    assert served.status().notes == [f"the monitor is silent for 7.5 s: {NO_MONITOR}"]
    assert serving().status().notes == [f"the monitor is silent since the broker's start: {NO_MONITOR}"]


@pytest.mark.parametrize(
    ("event", "note"),
    [
        (PeerDown("d1"), "d1 is lost: connection lost"),
        (
            heartbeat("d1", role="decode", counters={"unsent_full_p1": 3, "unsent_away_p1": 9, "late": 2}),
            "d1 could not send 3 messages to p1, whose queue was full",
        ),
        (
            heartbeat("d1", role="decode", counters={"garbage_version": 2}),
            "d1 dropped 2 invalid messages (garbage_version)",
        ),
        (
            heartbeat("d1", role="decode", counters={"injected_drop": 0}),
            "d1: a rehearsal: faults are injected here (transfer.faults, transfer.cuts)",
        ),
        (
            heartbeat("d1", role="decode", predictor=PredictorStatus(kind="hidden", on=False, note="off: worse")),
            "d1 predicts lengths by the prior alone: off: worse",
        ),
    ],
)
def test_each_degraded_mode_of_an_instance_is_a_line(served, event, note):
    served.tell(event)
    assert served.status().notes == [note]


@pytest.mark.parametrize(
    ("ratio", "noted"),
    [
        (StepRatio(), {}),
        (StepRatio(prefill=1.5, decode=0.67), {}),
        (StepRatio(prefill=3.875), {"prefill": "3.88"}),
        (StepRatio(prefill=1.0, decode=0.25), {"decode": "0.25"}),
        (StepRatio(prefill=1.51, decode=0.66), {"prefill": "1.51", "decode": "0.66"}),
    ],
)
def test_a_cost_table_that_is_wrong_by_more_than_half_is_named_until_its_worker_is_lost(served, ratio, noted):
    served.tell(heartbeat("d1", role="decode", step_ratio=ratio))
    why = "predictions are corrected. It is of another machine, or this one has other work"
    assert served.status().notes == [
        f"d1: {phase} steps take {factor} times as long as its cost table (engine.cost) predicts; {why}"
        for phase, factor in noted.items()
    ]
    assert {each.iid: each.step_ratio for each in served.status().instances} == {"d1": ratio, "p1": StepRatio()}
    served.tell(PeerDown("d1"))
    assert served.status().notes == ["d1 is lost: connection lost"]


def test_transfers_that_fail_are_named_by_pair_and_an_instance_that_can_read_nobody_once(served):
    served.tell(ready("p2", "prefill"), PeerUp("p2"))
    for iid in ("p1", "p2"):
        lost = {"d1": f"chunk 0 is lost at {iid}"}
        served.tell(heartbeat(iid, role="prefill", unread_by=lost, counters={"unread_d1": 55}))
    lines = [
        f"d1 cannot read KV of {iid}, which sends it little: chunk 0 is lost at {iid} (55 transfers failed)"
        for iid in ("p1", "p2")
    ]
    assert served.status().notes == lines
    served.tell(heartbeat("d1", role="decode", load=Load(free_blocks=7, unread=9)))
    line = "d1 cannot read KV: its last 9 transfers, from several instances, failed; it gets few requests"
    assert served.status().notes == [line]
    found = {each.iid: (each.load.unread, [*each.unread_by]) for each in served.status().instances}
    assert found == {"d1": (9, []), "p1": (0, ["d1"]), "p2": (0, ["d1"])}


def test_instances_that_nobody_can_be_paired_with_are_named():
    told = serving("p1", ("d1", {"fingerprint": fingerprint(dtype="f32")}))
    told.tell(ClusterView(epoch=1, number=7, loads=[]))
    both = [f"{iid}: exchanges KV with no other instance: never paired with" for iid in ("d1", "p1")]
    assert [note[: len(both[0])] for note in told.status().notes] == both
