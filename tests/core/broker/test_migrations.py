"""Running choices that go on at another instance, as the broker sees it: who holds them, whatever is lost."""

import pytest

from tests.core.broker.serving import RID, cancel, done, replies, serving, submit
from tests.core.build import BLOCK, close, ending, heartbeat, migrate, not_migrated, resend, staged, tokens, view
from tests.core.reading import only, sent
from tetri.core.actions import Send
from tetri.policy.rules import Rules
from tetri.request import Stage
from tetri.wire.clients import Delta
from tetri.wire.events import PeerDown
from tetri.wire.load import Load
from tetri.wire.messages import Assign, Close, Hold, Migrate

DECODING = [tokens("p1", RID, 0, 7), staged("d1", RID, Stage.DECODE), tokens("d1", RID, 1, 8)]


@pytest.fixture
def told():
    """A request that d1 decodes is asked to go on at d2."""
    made = serving("p1", "d1", "d2", "d3", limits={"max_attempts": 2})
    made.tell(submit(max_tokens=30), *DECODING)
    assert start(made) == [("d1", migrate(RID))]
    return made


def start(told, to="d2"):
    """Where what is sent goes."""
    actions = told.core.lifecycle.migrations.start(told.core.table.choices[RID], to)
    told.core.check()
    return where(actions)


def where(actions):
    return [(action.peer, action.message) for action in only(actions, Send)]


def held(stage, attempt=1, outputs=2):
    return Hold(RID, attempt, stage, outputs)


def holder(told):
    choice = told.core.table.choices[RID]
    return choice.holder, choice.attempt


@pytest.mark.parametrize(
    "event",
    [
        staged("d2", RID, Stage.WAITING, attempt=2),
        staged("d2", RID, Stage.DECODE, attempt=2),
        tokens("d2", RID, 2, 9, attempt=2),
        heartbeat("d2", held(Stage.WAITING, 2)),
        heartbeat("d2", held(Stage.DECODE, 2)),
    ],
    ids=["waiting", "decode", "tokens", "holds", "runs"],
)
def test_the_first_report_that_all_has_landed_makes_it_the_holder(told, event):
    actions = told.tell(event)
    assert (holder(told), sent(actions, "d1")) == (("d2", 2), [close(RID)])
    assert told.status().counters["migrated"] == 1
    assert not replies(told.tell(tokens("d1", RID, 2, 9))), "what the source wrote last comes late"
    (delta,) = replies(
        told.tell(tokens("d2", RID, 2, 9, 4, attempt=2)) or told.tell(tokens("d2", RID, 3, 4, attempt=2))
    )
    assert isinstance(delta, Delta) and delta.ids[-1] == 4


def test_until_then_the_source_holds_it(told):
    assert not told.tell(heartbeat("d2", held(Stage.MOVING, 2, 0)))
    assert len(replies(told.tell(tokens("d1", RID, 2, 9)))) == 1
    assert holder(told) == ("d1", 1)


def test_the_destination_is_asked_for_what_got_lost_between_the_two(told):
    assert sent(told.tell(tokens("d2", RID, 4, 9, attempt=2)), "d2") == [resend(RID, 2, attempt=2)]


def test_a_migrate_is_repeated_until_it_is_known_what_became_of_it(told):
    again = [("d1", migrate(RID))]
    assert where(told.tell(heartbeat("d1", held(Stage.DECODE)))) == again
    assert where(told.tell(heartbeat("d1", held(Stage.WAITING)))) == again, "it has stopped"
    told.tell(not_migrated("d1", RID))
    assert not told.tell(heartbeat("d1", held(Stage.DECODE)))


def test_what_cannot_go_elsewhere_goes_on_and_that_attempt_is_void(told):
    assert not told.tell(not_migrated("d1", RID))
    late = told.tell(staged("d2", RID, Stage.WAITING, attempt=2), heartbeat("d2", held(Stage.WAITING, 2)))
    assert holder(told) == ("d1", 1) and sent(late, "d2") == [close(RID, 2)]
    assert start(told, "d3") == [("d1", migrate(RID, "d3", 3))]


def test_a_source_that_has_stopped_goes_on_when_the_destination_can_no_longer_have_it(told):
    assert where(told.tell(not_migrated("d1", RID, held=True))) == [("d1", migrate(RID, "d1"))]
    assert where(told.tell(not_migrated("d1", RID, held=True))) == [("d1", migrate(RID, "d1"))], "as often as it asks"
    assert where(told.tell(heartbeat("d1", held(Stage.WAITING)))) == [("d1", migrate(RID, "d1"))]
    told.tell(staged("d2", RID, Stage.WAITING, attempt=2))
    assert holder(told) == ("d1", 1)


def test_a_source_that_asks_too_late_is_closed(told):
    told.tell(staged("d2", RID, Stage.WAITING, attempt=2))
    assert not told.tell(not_migrated("d1", RID, held=True))
    assert holder(told) == ("d2", 2)


def test_a_destination_that_is_lost_leaves_it_where_it_is(told):
    assert where(told.tell(PeerDown("d2")))[:1] == [("d1", migrate(RID, "d1"))]
    assert holder(told) == ("d1", 1) and "restarts" not in told.status().counters


def test_with_the_source_it_starts_over_under_a_number_that_nobody_has(told):
    actions = told.tell(PeerDown("d1"))
    assert sent(actions, "d2", Close) == [close(RID, 2)]
    assert [(made.attempt, made.output) for made in sent(actions, kind=Assign)] == [(3, [7, 8])]


def test_with_the_destination_too_once_that_holds_it(told):
    told.tell(staged("d2", RID, Stage.WAITING, attempt=2))
    assert [made.attempt for made in sent(told.tell(PeerDown("d2")), kind=Assign)] == [3]


def test_moves_are_no_attempts(told):
    """Of two that are allowed it has had one."""
    told.tell(staged("d2", RID, Stage.DECODE, attempt=2))
    assert start(told, "d3") == [("d2", migrate(RID, "d3", 3, attempt=2))]
    told.tell(not_migrated("d2", RID, 3, attempt=2))
    assert start(told, "d3") == [("d2", migrate(RID, "d3", 4, attempt=2))]
    told.tell(staged("d3", RID, Stage.DECODE, attempt=4))
    receipt = done(told.tell(*ending("d3", RID, 2, 9, attempt=4))).receipt
    assert receipt.attempts == 1


def test_an_end_or_a_cancel_closes_it_everywhere(told):
    actions = told.tell(cancel())
    assert {peer: made.attempt for peer, made in where(actions) if isinstance(made, Close)} == {
        "p1": 2,
        "d1": 2,
        "d2": 2,
    }
    assert not sent(told.tell(staged("d2", RID, Stage.WAITING, attempt=2)), "d1")


def test_only_what_runs_is_moved_and_only_to_who_is_there():
    told = serving("p1", "d1", "d2")
    told.tell(submit(max_tokens=30), DECODING[0])
    assert not start(told)
    told.tell(*DECODING[1:])
    assert not start(told, "d1") and not start(told, "d9")
    told.tell(PeerDown("d2"))
    assert not start(told)


# ---------------------------------------------------------------- by policy


def planned(told, keeps=(), **loads):
    made = view(told_number(told), **loads).changed(keeps=dict.fromkeys(keeps, "prefill"))
    return [(peer, made.rid, made.to) for peer, made in where(told.tell(made)) if _is(made)]


def _is(made):
    return isinstance(made, Migrate)


def told_number(told):
    told.views = getattr(told, "views", 0) + 1
    return told.views


def decoding(migrate_rule):
    told = serving("p1", "d1", "d2", rules=Rules(migrate=migrate_rule))
    told.tell(submit(max_tokens=30), *DECODING)
    return told


def test_loads_make_it_move_what_the_policy_names():
    short, roomy = Load(free_blocks=0, running=1), Load(free_blocks=10)
    assert planned(decoding("none"), d1=short, d2=roomy) == []
    assert planned(decoding("auto"), d1=short, d2=roomy) == [], "nobody is in that role"
    told = decoding("everywhere")
    assert planned(told, d1=Load(free_blocks=3, running=1), d2=roomy) == []
    assert planned(told, d1=short, d2=roomy) == [("d1", RID, "d2")]
    assert planned(told, d1=short, d2=roomy) == [], "it is on its way"


def test_none_goes_to_an_instance_that_keeps_to_prefill():
    told, loads = decoding("everywhere"), {"d1": Load(free_blocks=0, running=1), "d2": Load(free_blocks=10)}
    assert not planned(told, keeps=("d2",), **loads)
    assert planned(told, **loads) == [("d1", RID, "d2")]


def test_an_instance_that_did_not_take_one_rests():
    told, loads = decoding("everywhere"), {"d1": Load(free_blocks=0, running=1), "d2": Load(free_blocks=10)}
    assert planned(told, **loads)
    told.tell(not_migrated("d1", RID))
    assert not planned(told, **loads)
    told.now += 5.0
    assert planned(told, **loads) == [("d1", RID, "d2")]


def test_a_choice_needs_memory_for_what_it_may_write_on_its_way():
    """Its prompt, its output, and all that it may write still, here less than `AHEAD`: 33 tokens."""
    short, needs = Load(free_blocks=0, running=1), -(-33 // BLOCK)
    assert not planned(decoding("everywhere"), d1=short, d2=Load(free_blocks=needs))
    assert planned(decoding("everywhere"), d1=short, d2=Load(free_blocks=needs + 1))
