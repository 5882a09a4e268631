"""The monitor's core: views, and the transition watcher. Reports are told as a list; time is moved by hand."""

import pytest

from tests.core.build import Told, only, sent
from tetri.core.actions import BROKER, Broken, Publish
from tetri.core.monitor import LOW, Monitor
from tetri.policy.views import FlipSettings
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.messages import FlipWanted, Heartbeat, Load, LoadReport

SETTINGS = FlipSettings(idle_s=20.0, low_s=20.0, hold_s=10.0, floor=1, gain=2.0)
BUSY = {"queued": 3, "waiting": 2, "landed": 2, "running": 2, "busy": 1.0, "queued_s": 9.0, "decode_s": 9.0}


def monitor(flip="none", now=0.0, epoch=7, **changes):
    told = Told(Monitor(flip, SETTINGS, epoch=epoch, load_s=0.1, now=now, **changes))
    told.now = now
    return told


def report(iid, role, incarnation=1, **load):
    return LoadReport(iid=iid, incarnation=incarnation, role=role, load=Load(**{"free_blocks": 10, **load}))


def views(actions):
    return [action.message for action in only(actions, Publish)]


def wishes(actions):
    return [(wish.iid, wish.role) for wish in sent(actions, BROKER, FlipWanted)]


def live(told, seconds, *reports):
    """For so long everyone reports every half second; the reports of what the watcher wanted."""
    wanted, end = [], told.now + seconds
    while told.now < end - 1e-9:
        told.tell(*reports)
        wanted += sent(told.later(0.5), BROKER, FlipWanted)
    return [(wish.iid, wish.role) for wish in wanted]


# ---------------------------------------------------------------- views


def test_a_view_has_the_newest_load_of_everyone_with_its_age():
    told = monitor()
    told.tell(report("p0", "prefill", queued=1), report("d0", "decode"))
    told.now = 0.25
    told.tell(report("p0", "prefill", queued=2, queued_s=0.5))
    (view,) = views(told.later(0.05))
    assert view.epoch == 7
    first, second = view.loads
    assert (first.iid, first.incarnation, first.role, first.load.queued) == ("p0", 1, "prefill", 2)
    assert first.age_s == pytest.approx(0.05)
    assert (second.iid, second.role, second.load.free_blocks) == ("d0", "decode", 10)
    assert second.age_s == pytest.approx(0.3)


def test_views_are_numbered_and_come_every_load_s():
    told = monitor()
    assert told.core.deadline() == 0.0
    numbers = [view.number for _ in range(4) for view in views(told.later(0.1))]
    assert numbers == [1, 2, 3, 4] and told.core.deadline() == pytest.approx(0.5)
    assert told.core.tick(told.now) == []


def test_a_view_goes_out_at_once_when_somebody_comes_or_changes_and_only_then():
    told = monitor()
    assert len(views(told.tell(report("d0", "decode")))) == 1
    assert not told.tell(report("d0", "decode", free_blocks=3))
    (view,) = views(told.tell(report("d0", "prefill")))
    assert [load.role for load in view.loads] == ["prefill"]
    (view,) = views(told.tell(report("d0", "prefill", incarnation=2, free_blocks=8)))
    assert [(load.incarnation, load.load.free_blocks) for load in view.loads] == [(2, 8)]


def test_who_is_silent_ages_and_is_left_out_at_last():
    told = monitor(gone_s=5.0)
    told.tell(report("p0", "prefill"), report("d0", "decode"))
    told.now = 4.8
    told.tell(report("p0", "prefill"))
    (view,) = views(told.later(0.1))
    assert {load.iid: round(load.age_s, 3) for load in view.loads} == {"p0": 0.1, "d0": 4.9}
    (view,) = views(told.later(0.15))
    assert [load.iid for load in view.loads] == ["p0"]
    (view,) = views(told.tell(report("d0", "decode")))  # it had only been silent
    assert [load.iid for load in view.loads] == ["p0", "d0"]


def test_a_restarted_monitor_begins_a_new_epoch_and_learns_everything_from_reports():
    told = monitor("idle", now=500.0, epoch=8)
    (view,) = views(told.later())
    assert (view.epoch, view.number, view.loads) == (8, 1, [])
    (view,) = views(told.tell(report("d0", "decode")))
    assert (view.epoch, view.number, [load.iid for load in view.loads]) == (8, 2, ["d0"])


def test_connections_say_nothing_that_reports_do_not():
    told = monitor()
    told.tell(report("d0", "decode"))
    assert not told.tell(PeerUp(BROKER), PeerDown("d0"), PeerDown(BROKER)) and "d0" in told.core.instances


# ---------------------------------------------------------------- what the policies see


def states(told):
    return {state.iid: state for state in told.core._states(told.now, told.core.instances)}


def test_idle_time_begins_with_the_last_work_and_ends_with_the_next():
    told = monitor()
    told.tell(report("d0", "decode", running=1, busy=1.0))
    assert states(told)["d0"].idle_s == 0
    told.now = 1.0
    told.tell(report("d0", "decode", busy=0.5))  # it has ended its last request in between
    told.now = 1.5
    told.tell(report("d0", "decode"))
    assert states(told)["d0"].idle_s == 0.5
    told.tell(report("d0", "decode", busy=0.1))  # and had a short one that nobody saw
    assert states(told)["d0"].idle_s == 0
    for work in ("queued", "waiting", "running"):
        told.now += 1.0
        told.tell(report("d0", "decode"))
        assert states(told)["d0"].idle_s >= 0
        told.tell(report("d0", "decode", **{work: 1}))
        assert states(told)["d0"].idle_s == 0


def test_a_low_load_is_low_over_a_while():
    told = monitor()
    told.tell(report("d0", "decode", busy=0.05))
    for step in range(40):  # a step of half a tenth, once a second: 5 %
        told.now += 0.1
        told.tell(report("d0", "decode", busy=0.5 if step % 10 == 0 else 0.0))
    assert states(told)["d0"].low_s == pytest.approx(4.0) and told.core.instances["d0"].busy < LOW
    for _ in range(40):
        told.now += 0.1
        told.tell(report("d0", "decode", busy=0.9))
    assert states(told)["d0"].low_s == 0 and told.core.instances["d0"].busy > LOW
    for _ in range(200):
        told.now += 0.1
        told.tell(report("d0", "decode", busy=0.0))
    assert 0 < states(told)["d0"].low_s < 20.0


@pytest.mark.parametrize("busy, share", [(-1.0, 0.0), (7.0, 1.0), (0.3, 0.3), (float("nan"), 0.0), (float("inf"), 1.0)])
def test_a_share_is_between_none_and_all(busy, share):
    told = monitor()
    told.tell(report("d0", "decode", busy=busy))
    told.now = 1.0
    told.tell(report("d0", "decode", busy=busy))
    assert told.core.instances["d0"].busy == pytest.approx(share)


def test_a_stale_report_is_no_sign_of_leisure_and_work_is_told_in_seconds():
    told = monitor(stale_s=1.0)
    told.tell(report("p0", "prefill", queued=2, queued_s=1.5, decode_s=0.5), report("d0", "decode"))
    told.now = 1.0
    assert (states(told)["d0"].idle_s, states(told)["d0"].low_s) == (1.0, 1.0)
    told.now = 1.1
    assert (states(told)["d0"].idle_s, states(told)["d0"].low_s) == (0.0, 0.0)
    assert (states(told)["p0"].work_s, states(told)["p0"].queued) == (2.0, 2)


def test_who_waits_for_its_kv_is_told_apart_from_who_waits_for_a_place():
    told = monitor()
    told.tell(report("d0", "decode", waiting=5, landed=2, running=3), report("d1", "decode", waiting=1, landed=9))
    assert [(each.waiting, each.running, each.moving) for each in states(told).values()] == [(2, 3, 3), (9, 0, 0)]


def test_clocks_begin_anew_with_a_role_and_with_an_incarnation():
    told = monitor()
    told.tell(report("d0", "decode"))
    for changes in ({"role": "prefill"}, {"role": "prefill", "incarnation": 2}):
        told.now += 5.0
        told.tell(report("d0", **changes))
        assert states(told)["d0"].idle_s == 0


# ---------------------------------------------------------------- flips


IDLE = [report("p0", "prefill", **BUSY), report("d0", "decode"), report("d1", "decode", **BUSY)]


def test_the_policy_decides_from_the_reports():
    told = monitor("idle")
    assert live(told, 19.5, *IDLE) == [] and live(told, 1.0, *IDLE) == [("d0", "prefill")]


def test_without_a_policy_nobody_flips():
    assert live(monitor("none"), 60.0, *IDLE) == []


def test_the_floor_of_a_role_stays():
    assert live(monitor("idle"), 60.0, report("p0", "prefill", **BUSY), report("d0", "decode")) == []


def test_a_flip_that_nobody_carries_out_is_wished_again_after_the_hold():
    told = monitor("idle")
    live(told, 21.0, *IDLE)
    assert live(told, 8.5, *IDLE) == [] and live(told, 1.0, *IDLE) == [("d0", "prefill")]


def test_after_a_flip_nobody_flips_for_a_while():
    told = monitor("idle")
    live(told, 21.0, *IDLE)
    told.tell(report("d0", "prefill"))  # confirmed
    was = told.now
    back = [report("p0", "prefill"), report("d0", "prefill"), report("d1", "decode", **BUSY)]
    assert live(told, 10.0, *back) == [] and told.core.quiet_until == was + SETTINGS.hold_s
    assert live(told, 15.0, *back) == [("p0", "decode")]  # p0, idle for longer than d0 in its new role


def test_a_flip_by_hand_is_left_alone_as_well():
    told = monitor("idle")
    live(told, 19.0, *IDLE)
    told.tell(report("d1", "mixed", **BUSY))
    assert live(told, 9.5, *IDLE[:2], report("d1", "mixed", **BUSY)) == []
    assert live(told, 1.0, *IDLE[:2], report("d1", "mixed", **BUSY)) == [("d0", "prefill")]


def test_a_new_monitor_watches_before_it_flips():
    told = monitor("balance", now=100.0)
    queue = [report("p0", "prefill", **{**BUSY, "queued_s": 60.0}), *(report(f"d{i}", "decode") for i in range(3))]
    assert live(told, 9.5, *queue) == [] and live(told, 1.0, *queue) == [("d0", "prefill")]


# ---------------------------------------------------------------- rescue


def test_when_the_last_of_a_role_is_gone_somebody_takes_it_over():
    told = monitor("none")
    told.tell(report("p0", "prefill", **BUSY), report("p1", "prefill"), report("d0", "decode"))
    prefills = [report("p0", "prefill", **BUSY), report("p1", "prefill")]
    assert live(told, 4.0, *prefills) == []  # d0 may come back
    assert live(told, 1.0, *prefills) == [("p1", "mixed")]
    assert live(told, 1.5, *prefills) == [("p1", "mixed")]  # not yet carried out: wished again
    assert live(told, 9.0, prefills[0], report("p1", "mixed")) == []


def test_who_is_there_first_does_not_take_both_roles():
    told = monitor("none", now=100.0, gone_s=5.0)
    assert live(told, 44.5, report("d0", "decode")) == []  # the other's engine may take so long to start
    assert live(told, 0.5, report("d0", "decode")) == [("d0", "mixed")]


def test_a_monitor_that_has_just_started_waits_for_the_others():
    told = monitor("none", now=100.0, gone_s=5.0)
    told.tell(report("p0", "prefill"), report("d0", "decode"), report("p0", "decode"))
    assert live(told, 4.5, report("d0", "decode"), report("p0", "decode")) == []
    assert live(told, 0.5, report("d0", "decode"), report("p0", "decode")) == [("p0", "mixed")]


def test_with_nobody_there_nobody_is_asked():
    assert live(monitor("idle"), 30.0) == []


@pytest.mark.parametrize("own, other", [("prefill", "decode"), ("decode", "prefill")])
def test_who_took_a_second_role_gives_it_up_when_others_have_it(own, other):
    told = monitor("none")
    told.tell(report("z", other))
    assert live(told, 5.5, report("a", own)) == [("a", "mixed")]
    assert live(told, 20.0, report("a", "mixed")) == []
    assert live(told, 9.5, report("a", "mixed"), report("b", other)) == []
    assert live(told, 1.5, report("a", "mixed"), report("b", other)) == [("a", own)]
    assert live(told, 30.0, report("a", own), report("b", other)) == [] and told.core.rescued == {}


@pytest.mark.parametrize("between", [{"role": "prefill"}, {"role": "prefill", "incarnation": 2}])
def test_a_role_that_was_given_by_hand_or_by_configuration_stays(between):
    told = monitor("none")
    told.tell(report("z", "decode"))
    live(told, 5.5, report("a", "prefill"))
    told.tell(report("a", "mixed"), report("a", **between), report("b", "decode"))
    now = {**between, "role": "mixed"}
    assert live(told, 60.0, report("a", **now), report("b", "decode")) == [] and told.core.rescued == {}


def test_one_whose_help_was_not_wanted_after_all_is_mixed_by_hand_later_and_stays_so():
    told = monitor("none")
    told.tell(report("z", "decode"))
    assert live(told, 5.5, report("a", "prefill")) == [("a", "mixed")]  # the broker did not hear it
    assert live(told, 30.0, report("a", "prefill"), report("z", "decode")) == [] and told.core.rescued == {}
    assert live(told, 60.0, report("a", "mixed"), report("z", "decode")) == []


def test_who_is_silent_is_asked_for_help_only_when_nobody_else_is_there():
    told = monitor("none")
    told.tell(report("z", "decode"), report("a", "prefill"), report("b", "prefill", **BUSY))
    assert live(told, 4.5, report("a", "prefill"), report("b", "prefill", **BUSY)) == []
    assert live(told, 1.5, report("b", "prefill", **BUSY)) == [("a", "mixed"), ("b", "mixed")]
    alone = monitor("none")
    alone.tell(report("z", "decode"))
    live(alone, 4.9, report("a", "prefill"))
    assert sent(alone.later(2.0), BROKER, FlipWanted)[0].iid == "a"


def test_who_was_to_help_and_is_gone_is_forgotten():
    told = monitor("none")
    told.tell(report("z", "decode"))
    live(told, 5.5, report("a", "prefill"))
    assert told.core.rescued == {"a": "prefill"}
    told.later(6.0)
    assert told.core.rescued == {} and told.core.instances == {}


# ---------------------------------------------------------------- what must not be


def test_a_report_of_a_role_that_does_not_exist_is_not_heard():
    told = monitor("none")
    assert not told.tell(report("z", "tea")) and not told.core.instances
    told.tell(report("z", "prefill"))
    assert not told.tell(report("z", "tea", queued=3)) and told.core.instances["z"].load.queued == 0


def test_nonsense_is_refused():
    with pytest.raises(Broken, match="a monitor knows no"):
        monitor().core.handle(
            Heartbeat(iid="d0", incarnation=1, role="decode", load=Load(free_blocks=1), holds=[]), 0.0
        )


@pytest.mark.parametrize("wrong", [{"idle_at": 9.0}, {"low_at": 9.0}, {"since": 9.0}, {"busy": 1.5}])
def test_check_finds_an_impossible_state(wrong):
    told = monitor()
    told.tell(report("d0", "decode"))
    for name, value in wrong.items():
        setattr(told.core.instances["d0"], name, value)
    with pytest.raises(Broken, match="d0 has been so"):
        told.core.check()


def test_check_finds_a_stranger_that_was_rescued_and_a_view_that_never_comes():
    told = monitor()
    told.core.rescued["x"] = "decode"
    with pytest.raises(Broken, match="x is held in both roles"):
        told.core.check()
    told.core.rescued.clear()
    told.core.timers.clear("view")
    with pytest.raises(Broken, match="no next view"):
        told.core.check()
