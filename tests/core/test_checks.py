"""Every core counts all again in `check()`, and stops when something differs. No event leads to such a state, so these
tests, and no others, reach into a core to make one."""

import pytest

from tests.core.broker.serving import serving, submit
from tests.core.build import assign, capacity, report
from tests.core.driver import working
from tetri.core.actions import Broken
from tetri.core.monitor import Monitor
from tetri.core.prefill.decode_pool import Reservation
from tetri.policy.views import FlipSettings, Need
from tetri.wire.messages import FlipWanted

P, D = "p:a:1", "d:r:1:p1:1"


def prefilled(*decoders):
    """`a` is computed, and its KV is in the store."""
    told = working("p1", *decoders)
    told.tell(assign("a", prompt=8))
    told.step()
    return told.core


def decoding():
    large = capacity(blocks=60, context=200)
    return working("d1", "p1", capacity=large, reserve_share=1.0).running("r", max_tokens=60).core


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (lambda it, request: it.ledger.allocate("lost", 1), "1 accounts for 0 engine requests"),
        (lambda it, request: it.prefill.queue.line.update({P: None}), "still queued"),
        (lambda it, request: setattr(request, "running", True), "accounts and engine requests differ"),
        (lambda it, request: it.prefill.queue.started.update(x=request), "and others run"),
        (lambda it, request: it.prefill._attempts.clear(), "their index differ"),
        (lambda it, request: it.prefill.choices.clear(), "the index of their choices differ"),
        (lambda it, request: setattr(request.choices[0], "closed", True), "a request without a choice"),
        (lambda it, request: setattr(request.flow, "exported", 0), "moved more blocks"),
        (lambda it, request: setattr(it.prefill.kv_send, "used", 9), "9 of 8 slots"),
        (lambda it, request: it.prefill.kv_send.keeping.clear(), "slots are kept for others than"),
        (
            lambda it, request: setattr(request.flow, "exported", 9),
            "9 slots are kept for whom nobody takes yet, 5 may be",
        ),
        (lambda it, request: it.dispatcher._targets.clear(), "offers by instance are"),
        (lambda it, request: it.dispatcher.unplaceable.update({P: request}), "unplaceable, and on offer or gone"),
        (lambda it, request: it.dispatcher.offers.update({9: P}), "offer 9 is not what p:a:1 is on offer as"),
        (
            lambda it, request: it.dispatcher.pool.reservations.update({9: Reservation("d1", Need(1, 1, False))}),
            "claims of offers",
        ),
    ],
)
def test_a_prefill_request_that_is_counted_wrong_is_found(spoil, complaint):
    core = prefilled("d1")
    core.check()
    spoil(core, core.prefill.requests[P])
    with pytest.raises(Broken, match=complaint):
        core.check()


def test_one_that_waits_for_nobody_is_found():
    core = prefilled()
    core.dispatcher.unplaceable.clear()
    with pytest.raises(Broken, match="not all are in the line"):
        core.check()


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (lambda it, request: it._choices.clear(), "their index differ"),
        (lambda it, request: setattr(it.by_key[D], "key", "x"), "a hand-over has another key"),
        (lambda it, request: it.requests.clear(), "granted are others than"),
        (lambda it, request: it.ledger.close(D), "has no account"),
        (lambda it, request: it.moving.update(it.by_key), "is not where a request in decode belongs"),
        (lambda it, request: it.moving.update(gone=it.by_key[D]), "requests that are gone are still counted"),
        (lambda it, request: setattr(request, "landed_as", 0), "runs without its KV"),
        (lambda it, request: setattr(request, "mark", 9), "is to be looked at when it has 9"),
        (lambda it, request: request.tokens.extend([1] * 60), "runs past max_tokens"),
        (lambda it, request: it.batch.preempted.update(x=request), "are in the batch"),
        (lambda it, request: setattr(it.forecast, "left", 1), "counted"),
    ],
)
def test_a_decode_request_that_is_counted_wrong_is_found(spoil, complaint):
    half = decoding().decode
    half.check()
    spoil(half.hand_overs, half.hand_overs.requests[D])
    with pytest.raises(Broken, match=complaint):
        half.check()


def test_one_that_cannot_wait_for_admission_is_found():
    batch = decoding().decode.batch
    batch.landed["x"] = batch.running[D]
    with pytest.raises(Broken, match="waits for admission"):
        batch.check()


def test_a_leg_that_is_planned_without_room_is_found(monkeypatch):
    told = working("p1", "d1")
    told.tell(assign("a", prompt=8))
    monkeypatch.setattr(told.core.ledger, "allocate", lambda key, blocks: False)
    with pytest.raises(Broken, match="p:a:1 was planned without room"):
        told.later()


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (lambda core: core.members.by_iid.pop("p1"), "held by p1, which is lost or unknown"),
        (lambda core: core.members.turn(core.members.by_iid["d1"], "decode"), "d1 changes to mixed"),
        (lambda core: core.timers.set(("tea", "r1"), 0.0), "unknown timer tea"),
    ],
)
def test_a_broker_that_is_out_of_date_is_found(spoil, complaint):
    told = serving("p1", "d1")
    told.tell(submit(), FlipWanted(iid="d1", role="mixed", why="idle"))
    spoil(told.core)
    with pytest.raises(Broken, match=complaint):
        told.later()


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (lambda it: setattr(it.instances["d0"], "idle_at", 9.0), "d0 has been so"),
        (lambda it: setattr(it.instances["d0"], "low_at", 9.0), "d0 has been so"),
        (lambda it: setattr(it.instances["d0"], "since", 9.0), "d0 has been so"),
        (lambda it: setattr(it.instances["d0"], "busy", 9.0), "d0 has been so"),
        (lambda it: it.rescued.update(x="decode"), "x is held in both roles"),
        (lambda it: it.timers.clear("view"), "no next view"),
    ],
)
def test_a_monitor_in_an_impossible_state_is_found(spoil, complaint):
    core = Monitor("none", FlipSettings(), epoch=7, load_s=0.1, now=0.0)
    core.handle(report("d0", "decode"), 0.0)
    core.check()
    spoil(core)
    with pytest.raises(Broken, match=complaint):
        core.check()
