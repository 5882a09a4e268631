"""Changes of role as the broker carries them out: asked by a client or wanted by the monitor."""

from random import Random

import pytest
from msgspec.structs import replace

from tests.core.build import WordingTold, fingerprint, only, ready, sent, staged, tokens
from tetri.core.actions import Broken, FromClient, Reply, Submitted
from tetri.core.broker.broker import Broker
from tetri.core.broker.delivery import Limits
from tetri.core.broker.roles import ANSWERS
from tetri.policy.rules import Rules
from tetri.request import Sampling, Stage
from tetri.wire.clients import ChangeRole, Inspect, Refused, RoleChanged
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.messages import Assign, Flip, FlipWanted, FromWorker, Heartbeat, Load, Membership

LIMITS = Limits(context=40, vocabulary=100, heartbeat_s=0.1, dead_s=5.0)
RID = "00002a-1"
FIRST = 43  # the number of the first Flip under epoch 42; they count up


def ask(iid, role, key="f", client=b"c"):
    return FromClient(client, ChangeRole(key=key, iid=iid, role=role))


def want(iid, role):
    return FlipWanted(iid=iid, role=role, why="idle")


def heartbeat(iid, role, flip=FIRST):
    """`flip`: the number of the one that it obeyed last."""
    return Heartbeat(iid=iid, incarnation=1, role=role, load=Load(free_blocks=7), holds=[], flip=flip)


def submit(key="k"):
    return Submitted(b"c", key, (1, 2, 3), Sampling(max_tokens=4))


def answers(actions, client=b"c"):
    return [action.message for action in only(actions, Reply) if action.client == client]


def refusal(actions):
    (found,) = answers(actions)
    assert isinstance(found, Refused)
    return found.reason


def roles(told):
    return {peer.iid: peer.role for peer in told.core.members.by_iid.values()}


@pytest.fixture
def told():
    """A broker with p1, p2, d1 and d2."""
    made = WordingTold(Broker(LIMITS, Rules(), epoch=42, rng=Random(1), now=0.0))
    for iid, role in (("p1", "prefill"), ("p2", "prefill"), ("d1", "decode"), ("d2", "decode")):
        made.tell(ready(iid, role), PeerUp(iid))
    yield made
    made.core.check()


# ---------------------------------------------------------------- the way of a flip


@pytest.mark.parametrize("role", ["prefill", "mixed"])
def test_everyone_learns_the_new_role_first_then_the_worker_and_its_beat_is_the_answer(told, role):
    actions = told.tell(ask("d1", role))
    assert not answers(actions) and sent(actions)[-1] == Flip(role=role, number=FIRST) and sent(actions, "d1", Flip)
    (membership,) = sent(actions, "p1", Membership)
    assert {entry.iid: entry.role for entry in membership.instances}["d1"] == role
    told.now = 0.004
    confirmed = told.tell(heartbeat("d1", role))
    assert answers(confirmed) == [RoleChanged(key="f", iid="d1", role=role, was="decode", took_s=0.004)]
    assert told.core.counters["flips"] == 1 and not told.tell(heartbeat("d1", role))
    (status,) = answers(told.tell(FromClient(b"c", Inspect())))
    assert {each.iid: each.role for each in status.instances}["d1"] == role


def test_it_is_told_again_with_every_beat_that_says_otherwise(told):
    told.tell(ask("d1", "prefill"))
    for _ in range(3):
        assert sent(told.tell(heartbeat("d1", "decode", 0))) == [Flip(role="prefill", number=FIRST)]
    assert roles(told)["d1"] == "prefill"
    assert isinstance(answers(told.tell(heartbeat("d1", "prefill")))[0], RoleChanged)


def test_a_new_prefill_instance_gets_what_waits_and_all_that_comes():
    told = WordingTold(Broker(LIMITS, Rules(), epoch=42, rng=Random(1), now=0.0))
    told.tell(submit(), *(event for iid in ("d1", "d2") for event in (ready(iid, "decode"), PeerUp(iid))))
    assert sent(told.tell(ask("d1", "mixed")), "d1", Assign)
    assert sent(told.tell(submit("k2")), "d1", Assign)


def test_one_that_decodes_now_gets_no_new_prompts_and_goes_on_with_its_old_ones(told):
    told.tell(submit(), ask("p1", "decode"))
    row = told.core.table.rows[RID]
    assert row.prefill == "p1" and row.attempt == 1
    for number in range(3):
        assert sent(told.tell(submit(f"k{number}")), "p2", Assign)
    told.tell(staged("p1", RID, Stage.PREFILL), tokens("p1", RID, 0, 7), staged("p1", RID, Stage.WAITING))
    assert row.decode == "p1" and row.attempt == 1


def test_the_monitors_wish_is_carried_out_without_an_answer(told):
    assert sent(told.tell(want("d1", "prefill")), "d1", Flip) == [Flip(role="prefill", number=FIRST)]
    told.tell(want("d1", "decode"))  # not while it is under way
    assert not told.tell(heartbeat("d1", "prefill")) and roles(told)["d1"] == "prefill"
    assert not told.tell(want("d1", "prefill"))  # it is so
    assert not told.tell(want("d2", "prefill"), want("nobody", "decode"), want("p1", "tea"))
    assert (told.core.counters["flips"], told.core.lifecycle.counters["flips_refused"]) == (1, 4)


# ---------------------------------------------------------------- asking again, asking otherwise


def test_the_same_key_gets_the_same_answer_and_no_second_flip(told):
    told.tell(ask("d1", "prefill"))
    assert not told.tell(ask("d1", "prefill", client=b"again"))
    answer = told.tell(heartbeat("d1", "prefill"))
    assert isinstance(answers(answer, b"again")[0], RoleChanged) and not answers(answer)
    told.tell(ask("d1", "decode", "other"), heartbeat("d1", "decode", FIRST + 1))
    again = told.tell(ask("d1", "prefill"))
    assert answers(again) == answers(answer, b"again") and not sent(again) and roles(told)["d1"] == "decode"


def test_a_refusal_is_remembered_as_well(told):
    why = refusal(told.tell(ask("x", "decode")))
    told.tell(ready("x", "prefill"))
    assert refusal(told.tell(ask("x", "decode"))) == why and roles(told)["x"] == "prefill"


def test_answers_are_forgotten_after_many_others(told):
    for number in range(ANSWERS + 1):
        told.core.handle(ask("p1", "tea", f"f{number}"), 0.0)
    assert len(told.core.flips._answers) == ANSWERS and "f0" not in told.core.flips._answers


def test_the_role_that_it_has_is_confirmed_by_the_worker_and_nobody_else_hears_of_it(told):
    """A Flip that was given up, since its worker was restarted, may have reached the new process."""
    told.tell(ask("p1", "decode", "a"), ready("p1", "prefill", incarnation=2))
    actions = told.tell(ask("p1", "prefill"))
    assert sent(actions) == [Flip(role="prefill", number=FIRST + 1)] and not answers(actions)
    late = Heartbeat(iid="p1", incarnation=2, role="decode", load=Load(free_blocks=7), holds=[], flip=FIRST)
    assert sent(told.tell(late)) == [Flip(role="prefill", number=FIRST + 1)] and roles(told)["p1"] == "prefill"
    told.now = 0.5
    actions = told.tell(replace(late, role="prefill", flip=FIRST + 1))
    assert answers(actions) == [RoleChanged(key="f", iid="p1", role="prefill", was="prefill", took_s=0.5)]


def test_two_who_want_the_same_are_both_told_each_with_its_own_time(told):
    told.tell(ask("d1", "prefill", "a", b"a"))
    told.now = 1.0
    assert not told.tell(ask("d1", "prefill", "b", b"b"))
    told.now = 1.5
    actions = told.tell(heartbeat("d1", "prefill"))
    assert [each.took_s for client in (b"a", b"b") for each in answers(actions, client)] == [1.5, 0.5]
    assert told.core.counters["flips"] == 1


def test_who_asks_otherwise_meanwhile_wins(told):
    told.tell(ask("d1", "prefill", "a", b"a"))
    actions = told.tell(ask("d1", "mixed", "b", b"b"))
    (refused,) = answers(actions, b"a")
    assert refused.reason == "d1 was asked to become mixed before it had answered"
    second = Flip(role="mixed", number=FIRST + 1)
    assert sent(actions, "d1", Flip) == [second]
    assert sent(told.tell(heartbeat("d1", "prefill")), "d1") == [second]  # it has obeyed the first
    (changed,) = answers(told.tell(heartbeat("d1", "mixed", FIRST + 1)), b"b")
    assert (changed.was, changed.role) == ("prefill", "mixed")


def test_flipped_and_flipped_back_an_old_beat_is_no_answer(told):
    """The first Flip has arrived, the second is lost, and a Heartbeat from before both is still on its way."""
    told.tell(ask("d1", "prefill", "a"), ask("d1", "decode", "b"))
    second = Flip(role="decode", number=FIRST + 1)
    for old in (heartbeat("d1", "decode", 0), heartbeat("d1", "prefill", FIRST), ready("d1", "decode")):
        actions = told.tell(old)
        assert sent(actions, "d1", Flip) == [second] and not answers(actions) and roles(told)["d1"] == "decode"
    (changed,) = answers(told.tell(heartbeat("d1", "decode", FIRST + 1)))
    assert (changed.key, changed.role) == ("b", "decode")


def test_the_flips_of_another_broker_have_other_numbers(told):
    told.tell(ask("d1", "prefill"))
    assert sent(told.tell(heartbeat("d1", "prefill", 7)), "d1", Flip)  # obeyed under the one before
    assert answers(told.tell(heartbeat("d1", "prefill", FIRST)))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "iid, role, why",
    [
        ("x", "decode", "there is no instance 'x', only d1, d2, p1, p2"),
        ("d1", "tea", "there is no role 'tea': give prefill, decode or mixed"),
        ("x", "tea", "there is no role 'tea': give prefill, decode or mixed"),
    ],
)
def test_what_does_not_exist_is_refused(told, iid, role, why):
    actions = told.tell(ask(iid, role))
    assert refusal(actions) == why and not sent(actions)


def test_among_many_instances_only_some_are_named_and_among_none_none(told):
    for number in range(10):
        told.tell(ready(f"i{number}", "decode"))
    assert refusal(told.tell(ask("x", "decode"))).endswith("d1, d2, i0, i1, i2, i3, i4, i5, ...")
    empty = WordingTold(Broker(LIMITS, Rules(), epoch=42, rng=Random(1), now=0.0))
    assert refusal(empty.tell(ask("x", "decode"))) == "no instance is there"


@pytest.mark.parametrize(
    "first, last, role, phase", [("d1", "d2", "prefill", "decode"), ("p1", "p2", "decode", "prefill")]
)
def test_the_last_of_a_role_stays(told, first, last, role, phase):
    told.tell(ask(first, role), heartbeat(first, role))
    why = f"{last} is the last {phase} instance: flip another one to {phase} first, or make it mixed"
    assert refusal(told.tell(ask(last, role, "g"))) == why
    told.tell(ask(last, "mixed", "h"), heartbeat(last, "mixed", FIRST + 1))
    why = f"{last} is the last {phase} instance: flip another one to {phase} first, or leave it mixed"
    assert refusal(told.tell(ask(last, role, "i"))) == why
    told.tell(ask(first, "mixed", "j"), heartbeat(first, "mixed", FIRST + 2))
    assert not answers(told.tell(ask(last, role, "k")))


def test_others_that_are_lost_or_speak_another_language_do_not_count(told):
    told.tell(PeerDown("d2"), ready("d3", "decode", fingerprint=fingerprint(dtype="f32")), PeerUp("d3"))
    assert "d1 is the last decode instance" in refusal(told.tell(ask("d1", "prefill")))


def test_a_lost_instance_does_not_flip(told):
    told.tell(PeerDown("d1"))
    why = "d1 is lost (connection lost): only a live instance changes its role"
    assert refusal(told.tell(ask("d1", "prefill"))) == why


# ---------------------------------------------------------------- losses and restarts


def test_a_worker_that_is_lost_meanwhile_is_waited_for_no_longer(told):
    told.tell(ask("d1", "prefill"))
    assert refusal(told.tell(PeerDown("d1"))) == "d1 did not change its role: connection lost"
    told.tell(PeerUp("d1"), FromWorker(iid="d1", incarnation=1))
    actions = told.tell(heartbeat("d1", "decode"))  # it never heard of it: its own word counts
    assert roles(told)["d1"] == "decode" and sent(actions, "p1", Membership)


def test_a_worker_that_restarts_begins_in_the_role_that_it_says(told):
    told.tell(ask("d1", "prefill"), heartbeat("d1", "prefill"))
    told.tell(ready("d1", "decode", incarnation=2))
    assert roles(told)["d1"] == "decode" and not told.core.flips.changes


def test_a_worker_that_restarts_meanwhile_is_not_flipped(told):
    told.tell(ask("d1", "prefill"))
    actions = told.tell(ready("d1", "decode", incarnation=2))
    assert refusal(actions) == "d1 did not change its role: d1 was restarted"
    assert roles(told)["d1"] == "decode" and not sent(actions, kind=Flip)


def test_one_that_only_registers_again_is_told_again(told):
    told.tell(ask("d1", "prefill"))
    actions = told.tell(ready("d1", "decode"))
    assert sent(actions, "d1", Flip) and roles(told)["d1"] == "prefill"
    assert sent(told.tell(ready("d1", "prefill")), "d1", Flip)  # which says nothing of the Flip
    assert answers(told.tell(heartbeat("d1", "prefill")))[0].role == "prefill"


def test_a_new_broker_learns_the_roles_of_flipped_workers_from_themselves():
    told = WordingTold(Broker(LIMITS, Rules(), epoch=43, rng=Random(1), now=0.0))
    told.tell(ready("d1", "mixed"), PeerUp("d1"), submit())
    assert roles(told) == {"d1": "mixed"} and told.core.table.rows["00002b-1"].prefill == "d1"


def test_a_role_that_nobody_asked_for_is_believed_unless_there_is_no_such_role(told):
    actions = told.tell(heartbeat("d1", "mixed"))
    assert roles(told)["d1"] == "mixed" and sent(actions, "p1", Membership)
    assert not told.tell(heartbeat("d1", "tea")) and roles(told)["d1"] == "mixed"


@pytest.mark.parametrize("spoil", ["gone", "lost", "other"])
def test_check_finds_a_change_that_cannot_be(told, spoil):
    told.tell(ask("d1", "prefill"))
    core, peer = told.core, told.core.members.by_iid["d1"]
    if spoil == "gone":
        del core.members.by_iid["d1"]
    elif spoil == "lost":
        peer.lost = "away"
    else:
        peer.instance = peer.instance.in_role("decode")
    with pytest.raises(Broken, match="d1 is to become prefill"):
        core.check()
    core.flips.changes.clear()
