"""The monitor's core: views, and the transition watcher. Reports are told as a list; time is moved by hand."""

import pytest

from tests.core.build import heartbeat, report
from tests.core.reading import Told, only, sent
from tetri.core.actions import BROKER, Broken, Publish
from tetri.core.monitor import Monitor
from tetri.core.separation import Separation
from tetri.policy import rules as tables
from tetri.policy.views import FlipSettings
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.messages import FlipWanted

SETTINGS = FlipSettings(idle_s=20.0, low_s=20.0, hold_s=10.0, floor=1, gain=2.0)
BUSY = {"queued": 3, "waiting": 2, "landed": 2, "running": 2, "busy": 1.0, "queued_s": 9.0, "decode_s": 9.0}


def monitor(flip="none", now=0.0, epoch=7, settings=SETTINGS, load_s=0.1, **changes):
    told = Told(Monitor(flip, settings, epoch=epoch, load_s=load_s, now=now, **changes))
    told.now = now
    return told


def views(actions):
    return [action.message for action in only(actions, Publish)]


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
    loads = [(each.iid, each.incarnation, each.role, each.load.queued, round(each.age_s, 6)) for each in view.loads]
    assert view.epoch == 7 and loads == [("p0", 1, "prefill", 2, 0.05), ("d0", 1, "decode", 0, 0.3)]


def test_views_are_numbered_and_come_every_load_s():
    told = monitor()
    assert told.core.deadline() == 0.0
    numbers = [view.number for _ in range(4) for view in views(told.later(0.1))]
    assert numbers == [1, 2, 3, 4] and told.core.deadline() == pytest.approx(0.5)
    assert told.core.tick(told.now) == []


def test_a_view_goes_out_at_once_when_somebody_comes_or_changes_and_only_then():
    told = monitor()
    assert len(views(told.tell(report("d0", "decode")))) == 1
    assert not told.tell(report("d0", "decode", free_blocks=3), PeerUp(BROKER), PeerDown("d0"))
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


def test_an_instance_that_is_silent_does_not_count_as_one_that_decodes(monkeypatch):
    """If all others kept to prefill, nobody would decode."""
    asked = []
    monkeypatch.setattr(Separation, "look", lambda self, loads, now: asked.append([*loads]) or {})
    told = monitor(stale_s=1.0, gone_s=5.0)
    told.tell(report("a0", "auto"), report("a1", "auto"), report("p0", "prefill"))
    told.later(0.0)
    told.now = 1.5
    told.tell(report("a0", "auto"))
    told.later(0.0)
    assert asked[-2:] == [["a0", "a1"], ["a0"]]


# ---------------------------------------------------------------- what the policies see


class Watched(Told):
    """A monitor whose policy notes what it sees, and wants nothing."""

    def __init__(self, monkeypatch):
        self.seen = []
        monkeypatch.setitem(tables.FLIPS, "watched", lambda states, settings: self.seen.append(states))
        settings = FlipSettings(idle_s=20.0, low_s=20.0, hold_s=0.0, floor=1, gain=2.0)
        super().__init__(Monitor("watched", settings, epoch=7, load_s=1e-9, now=0.0, stale_s=1.0))

    def states(self):
        self.later(1e-6)
        return {state.iid: state for state in self.seen[-1]}

    def idle_s(self, iid="d0"):
        return pytest.approx(self.states()[iid].idle_s, abs=1e-4)

    def low_s(self, iid="d0"):
        return pytest.approx(self.states()[iid].low_s, abs=1e-4)

    def hear(self, after, *reports):
        self.now += after
        self.tell(*reports)


@pytest.fixture
def watched(monkeypatch):
    return Watched(monkeypatch)


def test_idle_time_begins_with_the_last_work_and_ends_with_the_next(watched):
    watched.hear(0.0, report("d0", "decode", running=1, busy=1.0))
    assert watched.idle_s() == 0
    watched.hear(1.0, report("d0", "decode", busy=0.5))  # it has ended its last request in between
    watched.hear(0.5, report("d0", "decode"))
    assert watched.idle_s() == 0.5
    watched.hear(0.0, report("d0", "decode", busy=0.1))  # and had a short one that nobody saw
    assert watched.idle_s() == 0
    for work in ("queued", "waiting", "running"):
        watched.hear(0.9, report("d0", "decode"))
        watched.hear(0.0, report("d0", "decode", **{work: 1}))
        assert watched.idle_s() == 0


def test_a_low_load_is_low_over_a_while(watched):
    watched.hear(0.0, report("d0", "decode", busy=0.05))
    for step in range(40):  # a step of half a tenth, once a second: 5 %
        watched.hear(0.1, report("d0", "decode", busy=0.5 if step % 10 == 0 else 0.0))
    assert watched.low_s() == 4.0
    for _ in range(40):
        watched.hear(0.1, report("d0", "decode", busy=0.9))
    assert watched.low_s() == 0
    for _ in range(200):
        watched.hear(0.1, report("d0", "decode", busy=0.0))
    assert 0 < watched.states()["d0"].low_s < 20.0


@pytest.mark.parametrize("busy, low", [(-1.0, True), (7.0, False), (0.3, False), (float("nan"), True), (0.05, True)])
def test_a_share_is_between_none_and_all(watched, busy, low):
    for _ in range(2):
        watched.hear(0.5, report("d0", "decode", busy=busy))
    assert watched.low_s() == (0.5 if low else 0.0)


def test_a_stale_report_is_no_sign_of_leisure_and_work_is_told_in_seconds(watched):
    watched.hear(0.0, report("p0", "prefill", queued=2, queued_s=1.5, decode_s=0.5), report("d0", "decode"))
    watched.now = 0.99
    assert (watched.idle_s(), watched.low_s()) == (0.99, 0.99)
    watched.now = 1.1
    assert (watched.idle_s(), watched.low_s()) == (0.0, 0.0)
    assert (watched.states()["p0"].work_s, watched.states()["p0"].queued) == (2.0, 2)


def test_who_waits_for_its_kv_is_told_apart_from_who_waits_for_a_place(watched):
    loads = [{"waiting": 5, "landed": 2, "running": 3}, {"waiting": 1, "landed": 9}]
    watched.hear(0.0, report("d0", "decode", **loads[0]), report("d1", "decode", **loads[1]))
    assert [(s.waiting, s.running, s.moving) for s in watched.states().values()] == [(2, 3, 3), (9, 0, 0)]


def test_clocks_begin_anew_with_a_role_and_with_an_incarnation(watched):
    watched.hear(0.0, report("d0", "decode"))
    for changes in ({"role": "prefill"}, {"role": "prefill", "incarnation": 2}):
        watched.hear(0.9, report("d0", **changes))
        assert watched.idle_s() == 0


# ---------------------------------------------------------------- flips


P0, P1, D0 = report("p0", "prefill"), report("p1", "prefill"), report("d0", "decode")
BUSY_P0, BUSY_D1 = report("p0", "prefill", **BUSY), report("d1", "decode", **BUSY)
IDLE = [BUSY_P0, D0, BUSY_D1]
FLIPPED = [P0, report("d0", "prefill"), BUSY_D1]
BY_HAND = [BUSY_P0, D0, report("d1", "mixed", **BUSY)]
QUEUE = [report("p0", "prefill", **{**BUSY, "queued_s": 60.0}), *(report(f"d{i}", "decode") for i in range(3))]
HELP, GIVE = [("p1", "mixed")], [("d0", "prefill")]


def mixed(iid, **changes):
    return report(iid, "mixed", **changes)


@pytest.mark.parametrize(
    "flip, story",
    [
        pytest.param("idle", [(19.5, IDLE, []), (1.0, IDLE, GIVE)], id="the policy decides from the reports"),
        pytest.param("none", [(60.0, IDLE, [])], id="without a policy nobody flips"),
        pytest.param("idle", [(60.0, [BUSY_P0, D0], [])], id="the floor of a role stays"),
        pytest.param("idle", [(21.0, IDLE, GIVE), (8.5, IDLE, []), (1.0, IDLE, GIVE)], id="a wish comes again"),
        pytest.param(  # p0 at last, idle for longer than d0 in its new role
            "idle", [(21.0, IDLE, GIVE), (10.0, FLIPPED, []), (15.0, FLIPPED, [("p0", "decode")])], id="after a flip"
        ),
        pytest.param("idle", [(19.0, IDLE, []), (9.5, BY_HAND, []), (1.0, BY_HAND, GIVE)], id="after one by hand"),
        pytest.param("balance", [(9.5, QUEUE, []), (1.0, QUEUE, GIVE)], id="a new monitor watches before it flips"),
        pytest.param("idle", [(30.0, [], [])], id="with nobody there nobody is asked"),
        pytest.param(  # d0 may come back; a wish that is not carried out comes again
            "none",
            [(0.0, [D0], []), (4.0, [BUSY_P0, P1], []), (1.0, [BUSY_P0, P1], HELP), (1.5, [BUSY_P0, P1], HELP)]
            + [(9.0, [BUSY_P0, mixed("p1")], [])],
            id="the last of a role is gone",
        ),
        pytest.param("none", [(44.5, [D0], []), (0.5, [D0], [("d0", "mixed")])], id="an engine may take so long"),
        pytest.param(  # it has just started, and waits for the others
            "none",
            [(0.0, [P0, D0, report("p0", "decode")], []), (4.5, [D0, report("p0", "decode")], [])]
            + [(0.5, [D0, report("p0", "decode")], [("p0", "mixed")])],
            id="a restarted monitor",
        ),
        *(
            pytest.param(
                "none",
                [(0.0, [report("z", other)], []), (5.5, [report("a", own)], [("a", "mixed")]), (20.0, [mixed("a")], [])]
                + [(9.5, [mixed("a"), report("b", other)], []), (1.5, [mixed("a"), report("b", other)], [("a", own)])]
                + [(30.0, [report("a", own), report("b", other)], [])],
                id=f"{own} gives decode up" if own == "prefill" else f"{own} gives prefill up",
            )
            for own, other in (("prefill", "decode"), ("decode", "prefill"))
        ),
        *(
            pytest.param(
                "none",
                [(0.0, [D0], []), (5.5, [P1], HELP), (0.0, [mixed("p1"), report("p1", "prefill", incarnation), D0], [])]
                + [(60.0, [mixed("p1", incarnation=incarnation), D0], [])],
                id=f"given by hand or by configuration {incarnation}",
            )
            for incarnation in (1, 2)
        ),
        pytest.param(  # the broker did not hear it
            "none",
            [(0.0, [D0], []), (5.5, [P1], HELP), (30.0, [P1, D0], []), (60.0, [mixed("p1"), D0], [])],
            id="its help was not wanted after all",
        ),
        pytest.param(  # or it would be asked to give up a role that it was given since
            "none",
            [(0.0, [D0], []), (5.5, [P1], HELP), (0.0, [mixed("p1")], []), (6.0, [], [])]
            + [(30.0, [D0, mixed("p1"), P0], [])],
            id="who was to help and is gone is forgotten",
        ),
    ],
)
@pytest.mark.parametrize("now", [0.0, 100.0])
def test_who_is_asked_to_change_its_role(now, flip, story):
    told = monitor(flip, now=now)
    for seconds, reports, wanted in story:
        told.tell(*reports)
        assert live(told, seconds, *reports) == wanted, f"{told.now} s"


def test_who_is_silent_is_asked_for_help_only_when_nobody_else_is_there():
    told = monitor("none")
    told.tell(report("z", "decode"), report("a", "prefill"), report("b", "prefill", **BUSY))
    assert live(told, 4.5, report("a", "prefill"), report("b", "prefill", **BUSY)) == []
    assert live(told, 1.5, report("b", "prefill", **BUSY)) == [("a", "mixed"), ("b", "mixed")]
    alone = monitor("none")
    alone.tell(report("z", "decode"))
    live(alone, 4.9, report("a", "prefill"))
    assert sent(alone.later(2.0), BROKER, FlipWanted)[0].iid == "a"


def test_a_report_of_a_role_that_does_not_exist_is_not_heard():
    told = monitor("none")
    assert not told.tell(report("z", "tea"))
    told.tell(report("z", "prefill"))
    assert not told.tell(report("z", "tea", queued=3))
    assert [(each.role, each.load.queued) for each in views(told.later())[0].loads] == [("prefill", 0)]


def test_nonsense_is_refused():
    with pytest.raises(Broken, match="a monitor knows no"):
        monitor().tell(heartbeat("d0"))
