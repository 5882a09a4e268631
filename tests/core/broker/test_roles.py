"""Changes of role as the broker carries them out: asked by an operator or wanted by the monitor."""

import pytest

from tests.core.broker.serving import RID, assigned, refusal, replies, serving, submit
from tests.core.build import fingerprint, flip, reach, ready, staged, tokens
from tests.core.build import heartbeat as beat_of
from tests.core.reading import sent
from tetri.core.actions import FromClient
from tetri.core.broker.roles import ANSWERS
from tetri.request import Stage
from tetri.wire.clients import ChangeRole, RoleChanged
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.messages import Flip, FlipWanted, FromWorker, Membership

FIRST = 43  # the number of the first Flip under epoch 42; they count up


def ask(iid, role, key="f", client=b"c"):
    return FromClient(client, ChangeRole(key=key, iid=iid, role=role))


def want(iid, role):
    return FlipWanted(iid=iid, role=role, why="idle")


def heartbeat(iid, role, number=FIRST, **changes):
    """`number`: of the Flip that it obeyed last."""
    return beat_of(iid, role=role, flip=number, **changes)


@pytest.fixture
def told():
    return serving("p1", "p2", "d1", "d2")


@pytest.mark.parametrize("role", ["prefill", "mixed"])
def test_everyone_learns_the_new_role_first_then_the_worker_and_its_beat_is_the_answer(told, role):
    actions = told.tell(ask("d1", role))
    assert not replies(actions) and sent(actions)[-1] == flip(role, FIRST) and sent(actions, "d1", Flip)
    (membership,) = sent(actions, "p1", Membership)
    assert {entry.iid: entry.role for entry in membership.instances}["d1"] == role
    told.now = 0.004
    confirmed = told.tell(heartbeat("d1", role))
    assert replies(confirmed) == [RoleChanged(key="f", iid="d1", role=role, was="decode", took_s=0.004)]
    assert told.status().counters["flips"] == 1 and not told.tell(heartbeat("d1", role)) and told.roles()["d1"] == role


@pytest.mark.parametrize(
    "says",
    [
        heartbeat("d1", "decode", 0),
        heartbeat("d1", "prefill", 7),  # obeyed under another broker, whose Flips have other numbers
        ready("d1", "decode"),
        ready("d1", "prefill"),  # which says nothing of the Flip
    ],
)
def test_it_is_told_again_whenever_it_does_not_say_that_it_has_obeyed(told, says):
    told.tell(ask("d1", "prefill"))
    for _ in range(3):
        assert sent(told.tell(says), "d1", Flip) == [flip("prefill", FIRST)] and told.roles()["d1"] == "prefill"
    assert isinstance(replies(told.tell(heartbeat("d1", "prefill")))[0], RoleChanged)


def test_a_new_prefill_instance_gets_what_waits_and_all_that_comes():
    told = serving("d1", "d2")
    told.tell(submit())
    assert assigned(told.tell(ask("d1", "mixed"))) == [("d1", RID, 1)]
    assert assigned(told.tell(submit("k2"))) == [("d1", "r2", 1)]


def test_one_that_decodes_now_gets_no_new_prompts_and_goes_on_with_its_old_ones(told):
    assert not assigned(told.tell(submit(), ask("p1", "decode")))[1:]
    assert {peer for peer, *_ in assigned(told.tell(*(submit(f"k{number}") for number in range(3))))} == {"p2"}
    news = [staged("p1", RID, Stage.PREFILL), tokens("p1", RID, 0, 7), staged("p1", RID, Stage.WAITING)]
    assert not assigned(told.tell(*news)) and told.status().requests == {"queued": 3, "waiting": 1}


def test_the_monitors_wish_is_carried_out_without_an_answer(told):
    assert sent(told.tell(want("d1", "prefill")), "d1", Flip) == [flip("prefill", FIRST)]
    told.tell(want("d1", "decode"))  # not while it is under way
    assert not told.tell(heartbeat("d1", "prefill")) and told.roles()["d1"] == "prefill"
    assert not told.tell(want("d1", "prefill"))  # it is so
    assert not told.tell(want("d2", "prefill"), want("nobody", "decode"), want("p1", "tea"))
    counters = told.status().counters
    assert (counters["flips"], counters["flips_refused"]) == (1, 4)


def test_the_same_key_gets_the_same_answer_and_no_second_flip(told):
    told.tell(ask("d1", "prefill"))
    assert not told.tell(ask("d1", "prefill", client=b"again"))
    answer = told.tell(heartbeat("d1", "prefill"))
    assert isinstance(replies(answer, b"again")[0], RoleChanged) and not replies(answer)
    told.tell(ask("d1", "decode", "other"), heartbeat("d1", "decode", FIRST + 1))
    again = told.tell(ask("d1", "prefill"))
    assert replies(again) == replies(answer, b"again") and not sent(again) and told.roles()["d1"] == "decode"


@pytest.mark.parametrize("answered", [True, False])
@pytest.mark.parametrize("other", [("d2", "prefill"), ("d1", "mixed"), ("x", "tea")])
def test_the_same_key_for_another_change_is_refused(told, answered, other):
    told.tell(ask("d1", "prefill"), *[heartbeat("d1", "prefill")] * answered)
    actions = told.tell(ask(*other, client=b"other"))
    assert [each.reason.split(":")[0] for each in replies(actions, b"other")] == ["this key stands for another request"]
    assert len(actions) == 1 and told.roles() == {"p1": "prefill", "p2": "prefill", "d1": "prefill", "d2": "decode"}
    confirmed = told.tell(*[ask("d1", "prefill")] * answered, *[heartbeat("d1", "prefill")] * (not answered))
    assert [type(each) for each in replies(confirmed)] == [RoleChanged]


def test_answers_are_forgotten_after_many_others(told):
    told.tell(*(ask("x", "decode", f"f{number}") for number in range(ANSWERS + 1)), ready("x", "decode"), PeerUp("x"))
    assert refusal(told.tell(ask("x", "decode", "f1"))).startswith("there is no instance 'x'")
    assert sent(told.tell(ask("x", "decode", "f0")), "x", Flip)  # asked anew


def test_of_the_role_that_it_has_nobody_else_hears(told):
    assert sent(told.tell(ask("p1", "prefill"))) == [flip("prefill", FIRST)]


def test_two_who_want_the_same_are_both_told_each_with_its_own_time(told):
    told.tell(ask("d1", "prefill", "a", b"a"))
    told.now = 1.0
    assert not told.tell(ask("d1", "prefill", "b", b"b"))
    told.now = 1.5
    actions = told.tell(heartbeat("d1", "prefill"))
    assert [each.took_s for client in (b"a", b"b") for each in replies(actions, client)] == [1.5, 0.5]
    assert told.status().counters["flips"] == 1


def test_who_asks_otherwise_meanwhile_wins(told):
    told.tell(ask("d1", "prefill", "a", b"a"))
    actions = told.tell(ask("d1", "mixed", "b", b"b"))
    (refused,) = replies(actions, b"a")
    assert refused.reason == "d1 was asked to become mixed before it had answered"
    second = flip("mixed", FIRST + 1)
    assert sent(actions, "d1", Flip) == [second]
    assert sent(told.tell(heartbeat("d1", "prefill")), "d1") == [second]  # it has obeyed the first
    (changed,) = replies(told.tell(heartbeat("d1", "mixed", FIRST + 1)), b"b")
    assert (changed.was, changed.role) == ("prefill", "mixed")


@pytest.mark.parametrize(
    "before, iid, role, why",
    [
        ([], "x", "decode", "there is no instance 'x', only d1, d2, p1, p2"),
        ([], "d1", "tea", "there is no role 'tea': give prefill, decode, mixed or auto"),
        ([PeerDown("d1")], "d1", "prefill", "d1 is lost (connection lost): only a live instance changes its role"),
        (
            [PeerDown("d2"), ready("d3", "decode", fingerprint=fingerprint(dtype="f32")), PeerUp("d3")],
            "d1",
            "prefill",  # others that are lost or speak another language do not count
            "d1 is the last decode instance: flip another one to decode first, or make it mixed",
        ),
    ],
)
def test_what_cannot_be_is_refused(told, before, iid, role, why):
    told.tell(*before)
    actions = told.tell(ask(iid, role))
    assert refusal(actions) == why and not sent(actions)


def test_among_many_instances_only_some_are_named_and_among_none_none(told):
    for number in range(10):
        told.tell(ready(f"i{number}", "decode"))
    assert refusal(told.tell(ask("x", "decode"))).endswith("d1, d2, i0, i1, i2, i3, i4, i5, ...")
    assert refusal(serving().tell(ask("x", "decode"))) == "no instance is there"


@pytest.mark.parametrize("both", ["mixed", "auto"])
@pytest.mark.parametrize(
    "first, last, role, phase", [("d1", "d2", "prefill", "decode"), ("p1", "p2", "decode", "prefill")]
)
def test_the_last_of_a_role_stays(told, first, last, role, phase, both):
    told.tell(ask(first, role), heartbeat(first, role))
    why = f"{last} is the last {phase} instance: flip another one to {phase} first, or make it mixed"
    assert refusal(told.tell(ask(last, role, "g"))) == why
    told.tell(ask(last, both, "h"), heartbeat(last, both, FIRST + 1))
    why = f"{last} is the last {phase} instance: flip another one to {phase} first, or leave it {both}"
    assert refusal(told.tell(ask(last, role, "i"))) == why
    told.tell(ask(first, both, "j"), heartbeat(first, both, FIRST + 2))
    assert not replies(told.tell(ask(last, role, "k")))


def test_a_worker_that_is_lost_meanwhile_is_waited_for_no_longer(told):
    told.tell(ask("d1", "prefill"))
    assert refusal(told.tell(PeerDown("d1"))) == "d1 did not change its role: connection lost"
    told.tell(PeerUp("d1"), FromWorker(iid="d1", incarnation=1))
    told.tell(heartbeat("d1", "decode"))  # it never heard of it: its own word counts
    assert told.roles()["d1"] == "decode" and sent(told.later(0.1), "p1", Membership)


@pytest.mark.parametrize("obeyed", [True, False])
def test_a_worker_that_restarts_begins_in_the_role_that_it_says(told, obeyed):
    told.tell(ask("d1", "prefill"), *[heartbeat("d1", "prefill")] * obeyed)
    actions = told.tell(ready("d1", "decode", incarnation=2))
    assert told.roles()["d1"] == "decode" and not sent(actions, kind=Flip)
    assert obeyed or refusal(actions) == "d1 did not change its role: d1 was restarted"


def test_a_role_that_nobody_asked_for_is_believed_unless_there_is_no_such_role(told):
    told.tell(heartbeat("d1", "mixed"))
    assert told.roles()["d1"] == "mixed" and sent(told.later(0.1), "p1", Membership)
    assert not told.tell(heartbeat("d1", "tea")) and told.roles()["d1"] == "mixed"


def test_the_last_instance_that_another_one_can_reach_keeps_its_role():
    """d2 has the same fingerprint, but is on another host, which p1 has no path to."""
    far = reach("d2", host="elsewhere", paths=["shm", "stream"])
    told = serving("p1", "d1", ("d2", {"reach": far}))
    why = "d1 is the last decode instance that exchanges KV with p1: flip another one to decode first, or make it mixed"
    assert refusal(told.tell(ask("d1", "prefill"))) == why
    told.tell(want("d1", "prefill"))
    assert told.roles()["d1"] == "decode" and told.status().counters["flips_refused"] == 1
    assert not replies(told.tell(ask("d1", "mixed", "g")))
    told = serving(("p1", {"reach": reach("p1", paths=["shm", "stream"])}), "d1", ("d2", {"reach": far}))
    assert "on its side" in refusal(told.tell(ask("d1", "prefill")))  # it would find nobody for its own prompts
    far_only = serving(("p1", {"reach": reach("p1", paths=["shm", "stream"])}), "d1", ("d2", {"reach": far}), "d3")
    assert not replies(far_only.tell(ask("d1", "prefill")))
