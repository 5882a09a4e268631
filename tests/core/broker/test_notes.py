"""What a Status says about a degraded cluster."""

import pytest

from tests.core.broker.serving import serving
from tests.core.build import fingerprint, heartbeat
from tetri.request import PredictorStatus
from tetri.wire.events import PeerDown
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


def test_instances_that_nobody_can_be_paired_with_are_named():
    told = serving("p1", ("d1", {"fingerprint": fingerprint(dtype="f32")}))
    told.tell(ClusterView(epoch=1, number=7, loads=[]))
    both = [f"{iid}: exchanges KV with no other instance: never paired with" for iid in ("d1", "p1")]
    assert [note[: len(both[0])] for note in told.status().notes] == both
