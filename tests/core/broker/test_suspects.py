"""Requests that may have killed their workers: computed alone, cleared or ended; and deaths that are nobody's fault."""

import pytest

from tests.core.broker.serving import RID, assigned, cancel, done, replies, serving, submit
from tests.core.build import close, failed, heartbeat, ready, staged, tokens
from tests.core.reading import sent
from tetri.core.actions import Send
from tetri.core.broker.suspects import away_from
from tetri.policy.views import PrefillPool
from tetri.request import Stage
from tetri.wire.clients import Done
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.messages import Assign, LoneStep, Proceed

MANY = ("p1", "p2", "p3", "p4", "d1", "d2")


def lone(iid, number=1, rid=RID, attempt=3, stage=Stage.PREFILL, *, over=False):
    return LoneStep(iid=iid, incarnation=1, rid=rid, attempt=attempt, number=number, stage=stage, over=over)


def proceed(iid, number=1, rid=RID, attempt=3):
    return Send(iid, Proceed(rid=rid, attempt=attempt, number=number))


@pytest.fixture
def suspected():
    """Two workers have died with it, and the third has it now."""
    told = serving(*MANY)
    told.tell(submit(), PeerDown("p1"))
    assert assigned(told.tell(PeerDown("p2"))) == [("p3", RID, 3)]
    return told


def assigns(told, *events):
    return [(each.alone, each.lost) for each in sent(told.tell(*events), kind=Assign)]


def test_after_the_second_death_it_is_computed_alone_and_elsewhere_each_time():
    told = serving(*MANY)
    assert assigns(told, submit()) == [(False, [])]
    assert assigns(told, PeerDown("p1")) == [(False, ["p1"])]
    assert assigns(told, PeerUp("p1"), ready("p1", "prefill", incarnation=2), PeerDown("p2")) == [(True, ["p1", "p2"])]
    assert assigned(told.tell(PeerDown("p3"))) == [("p4", RID, 4)]
    assert assigned(told.tell(PeerDown("p4"))) == [("p1", RID, 5)]  # nobody else is there


def test_whoever_kills_in_a_step_of_its_own_ends(suspected):
    assert suspected.tell(lone("p3")) == [proceed("p3")]
    assert not suspected.tell(PeerDown("p3"), PeerUp("p9"))[1:]  # but a Close
    assert not replies(suspected.later(0.9))
    ended = done(suspected.later(0.1))
    assert (ended.reason, ended.error) == (
        "error",
        "it kills workers: 3 of them were lost with it (p1, p2, p3), and the last one, p3, while it computed this "
        "request alone",
    )
    assert suspected.status().counters["guilty"] == 1


def test_in_a_decode_step_too_whose_hand_over_nobody_has_told_of(suspected):
    suspected.tell(lone("p3"), lone("p3", 2, over=True), tokens("p3", RID, 0, 7, attempt=3))
    assert suspected.tell(lone("d1", stage=Stage.WAITING)) == [Send("p3", close(RID, 3)), proceed("d1")]
    suspected.tell(PeerDown("d1"))
    error = done(suspected.later(1.0)).error
    assert error.startswith("it kills workers: 3 of them were lost with it (p1, p2, d1), and the last one, d1,")


@pytest.mark.parametrize("back", [heartbeat("p3"), ready("p3", "prefill")], ids=["heard", "registers"])
def test_whoever_is_accused_of_the_death_of_a_worker_that_comes_back_goes_on(suspected, back):
    suspected.tell(lone("p3"), PeerDown("p3"))
    assert assigned(suspected.tell(PeerUp("p3"), back)) == [("p3", RID, 4)]
    assert not replies(suspected.later(2.0))


def test_the_accused_may_be_cancelled(suspected):
    suspected.tell(lone("p3"), PeerDown("p3"))
    assert done(suspected.tell(cancel())).reason == "cancelled" and not replies(suspected.later(1.5))


@pytest.mark.parametrize(
    "events",
    [
        [],  # it waits, and others compute
        [lone("p3"), lone("p3", 2, over=True)],  # it came through it
        [lone("p3", rid="another")],
        [lone("p3", attempt=2)],
    ],
)
def test_whoever_was_not_computed_then_begins_anew_alone(suspected, events):
    suspected.tell(*events)
    assert assigns(suspected, PeerDown("p3")) == [(True, ["p1", "p2", "p3"])]


def test_the_first_two_deaths_end_nobody_even_alone():
    told = serving(*MANY)
    told.tell(submit(), lone("p1", attempt=1))
    assert assigned(told.tell(PeerDown("p1"))) == [("p2", RID, 2)]


def test_the_worker_is_answered_whatever_has_become_of_the_request(suspected):
    suspected.tell(cancel())
    assert suspected.tell(lone("p3")) == [Send("p3", close(RID, 3))]
    assert suspected.tell(lone("p3", 2, over=True)) == [proceed("p3", 2)]
    assert suspected.tell(lone("p3", 2, over=True)) == [proceed("p3", 2)]  # the first may be lost


def test_another_that_holds_it_does_not_compute_it(suspected):
    suspected.tell(staged("d1", RID, Stage.WAITING, 3))
    assert suspected.tell(lone("d2", stage=Stage.WAITING)) == [Send("d2", close(RID, 3))]
    assert suspected.tell(lone("p3")) == [Send("p3", close(RID, 3))]


def test_all_that_a_dead_worker_held_are_counted_and_only_those_of_both_deaths_run_alone():
    """What was in its step, only the worker knew: its last messages may be lost."""
    told = serving("p1", "d1")
    told.tell(submit("a"), submit("b"), staged("p1", "r1", Stage.PREFILL))
    back = [PeerDown("p1"), ready("p1", "prefill", incarnation=2), PeerUp("p1")]
    assert assigns(told, *back) == [(False, ["p1"])] * 2
    told.tell(submit("c"))
    back[1] = ready("p1", "prefill", incarnation=3)
    assert sorted(assigns(told, *back)) == [(False, ["p1"]), (True, ["p1"]), (True, ["p1"])]


def test_a_worker_that_comes_back_had_not_died(suspected):
    suspected.tell(PeerUp("p1"), heartbeat("p1"), PeerUp("p2"), ready("p2", "prefill"))
    assert assigns(suspected, PeerDown("p3")) == [(False, ["p3"])]


def test_kills_that_are_nobodys_fault_end_nobody():
    """An operator kills every worker twice, while all requests that it has run alone."""
    told = serving("p1", "p2", "d1")
    told.tell(*(submit(f"k{number}") for number in range(6)))
    actions = []
    for incarnation in (2, 3):
        for iid in ("p1", "p2"):
            actions += told.tell(PeerDown(iid), ready(iid, "prefill", incarnation=incarnation), PeerUp(iid))
    assert not [reply for reply in replies(actions) if isinstance(reply, Done)]
    assert told.status().requests == {"queued": 6}


@pytest.mark.parametrize("goes_on", [False, True])
def test_deaths_of_which_the_prefill_instance_alone_knows_count(goes_on):
    """The decode instance has died before anybody heard that it had the request."""
    told = serving(*MANY)
    told.tell(submit(), tokens("p1", RID, 0, 7), PeerDown("d1"))
    first = failed("p1", RID, retry=True).changed(lost="d1")
    if goes_on:
        first = staged("p1", RID, Stage.MOVING).changed(lost="d1")
    assert assigns(told, first) == ([] if goes_on else [(False, ["d1"])])
    attempt = 1 if goes_on else 2
    told.tell(tokens("p1", RID, 1, 8, attempt=attempt), PeerDown("d2"))
    second = staged("p1", RID, Stage.MOVING, attempt).changed(lost="d2")
    assert assigns(told, second) == [(True, ["d1", "d2"])]
    assert not told.tell(second.changed(lost="d9"))  # of an attempt that is over
    third = told.tell(failed("p1", RID, retry=True, attempt=attempt + 1).changed(lost="d9"))
    assert assigned(third) == [("p1", RID, attempt + 2)]  # an instance that the broker never knew


def test_the_pool_without_some_instances():
    pool = PrefillPool(["p1", "p2", "p3"], [1.0, 2.0, 3.0], [1.0, 0.5, 0.7], [4, 1, 4], ttft_s=9.0, last=2)
    assert away_from([], pool) is pool and away_from(["p1", "p2", "p3"], pool) is pool
    without_p1 = PrefillPool(["p2", "p3"], [2.0, 3.0], [0.5, 0.7], [1, 4], ttft_s=9.0, last=1)
    assert away_from(["p1", "d1"], pool) == without_p1
    without_p2 = PrefillPool(["p1", "p3"], [1.0, 3.0], [1.0, 0.7], [4, 4], ttft_s=9.0, last=1)
    assert away_from(["p2"], pool) == without_p2
    assert away_from(["p3"], pool).last == -1
