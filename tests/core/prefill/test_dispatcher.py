"""Whom a prefill instance asks to decode: offers, answers, losses, and how long it waits for somebody."""

import pytest

from tests.core.build import (
    PHASES,
    assign,
    capacity,
    close,
    defer,
    fingerprint,
    grant,
    instance,
    landed,
    membership,
    refuse,
    unread,
)
from tests.core.driver import working
from tests.core.reading import kinds, sent
from tetri.core.actions import BROKER
from tetri.policy.rules import Rules
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.handover import Drop, Offer
from tetri.wire.load import Load
from tetri.wire.messages import Failed

FULL = Load(free_blocks=4, deferred_blocks=14)  # of 10 blocks: it has deferred as much as it may


def begin(*decoders, prompt=8, **changes):
    """`a` is computed, and offered to the first of them."""
    told = working("p1", *decoders, **changes)
    told.tell(assign("a", prompt=prompt))
    for _ in range(0, prompt, 8):
        told.step()
    return told


@pytest.fixture
def offered():
    return begin("d1")


@pytest.fixture
def two():
    return begin("d1", "d2")


def to(peer, actions):
    return [kind for kind in kinds(actions) if kind.endswith(f" > {peer}")]


@pytest.mark.parametrize(
    "prompt, answers, again",
    [(8, [], ["Offer > d1", "Chunk > d1"]), (8, [grant("a")], ["Chunk > d1"]), (16, [landed("a", 0)], ["Chunk > d1"])],
    ids=["no answer", "granted", "landed, and the grant lost"],
)
def test_an_offer_and_its_chunks_are_repeated_until_answered(prompt, answers, again):
    told = begin("d1", prompt=prompt)
    told.tell(*answers)
    assert to("d1", told.later(1.0)) == again


def test_what_is_complete_is_asked_for_until_the_broker_closes_it(offered):
    offered.tell(landed("a", 0))
    assert to("d1", offered.later(1.0)) == ["Chunk > d1"]
    assert not offered.tell(landed("a", 0))
    (failed,) = sent(offered.tell(refuse("a")), BROKER)
    assert failed.retry and not sent(offered.later(1.0), "d1") and not offered.heartbeat().holds


def test_a_connection_that_stands_again_repeats_all(offered):
    assert kinds(offered.tell(PeerUp("d1"))) == ["Offer > d1", "Chunk > d1"]


def test_a_refused_offer_goes_to_another_with_the_same_slots(two):
    actions = two.tell(refuse("a"))
    assert kinds(actions) == ["Offer > d2"] and sent(actions)[0].offer == 2
    assert not two.tell(refuse("a", 2, "d2"))  # nobody is left, until the next view
    assert kinds(two.view(d1=10, d2=10)) == ["Offer > d1"]
    assert kinds(two.answer("a", grant)) == ["Chunk > d1"]  # it is told of the chunks only now


def test_old_answers_and_answers_to_others_are_ignored(two):
    two.tell(refuse("a"))
    for old in (refuse("a"), landed("a", 0), landed("x", 0, 2, "d2"), refuse("a", 2, "d2", attempt=9)):
        assert not two.tell(old)
    assert to("d2", two.later(1.0)) == ["Offer > d2"]


@pytest.mark.parametrize("answer", [grant, defer])
def test_an_offer_that_was_taken_back_and_is_granted_or_deferred_is_withdrawn_again(offered, answer):
    (drop,) = sent(offered.tell(answer("r", 3)), "d1")
    assert isinstance(drop, Drop) and (drop.rid, drop.offer) == ("r", 3)
    assert not offered.tell(landed("r", 0), refuse("r"))


@pytest.mark.parametrize("loss", [PeerDown("d1"), membership(9, instance("p1", "prefill"), instance("d2", "decode"))])
def test_a_lost_decode_instance_is_replaced_if_nothing_moved(two, loss):
    assert to("d2", two.tell(loss)) == ["Offer > d2"]
    assert kinds(two.answer("a", grant)) == ["Chunk > d2"]


@pytest.mark.parametrize("parts", [1, 2])
def test_a_decode_instance_lost_with_some_or_all_of_the_kv_needs_another_attempt(parts):
    told = begin("d1", "d2", prompt=16)
    told.tell(*[landed("a", index) for index in range(parts)])
    (failed,) = sent(told.tell(PeerDown("d1")), BROKER)
    assert failed.retry and "was lost with part of the KV" in failed.why


# ---------------------------------------------------------------- offers that wait for memory


def deferred(*decoders, prompt=8, **changes):
    """`a` is offered to d1, which defers that."""
    told = begin(*(decoders or ("d1",)), prompt=prompt, **changes)
    assert not told.tell(defer("a"))
    return told


def looking(*views, **changes):
    """`a` is deferred by d1. What the dispatcher sends when it looks, every 5 s, and these views have come before."""
    told = deferred("d1", "d2", load_s=0.5, heartbeat_s=1e6, **changes)
    found = []
    for loads in views:
        told.later(4.9)
        assert not told.view(**loads)
        found.append(told.later(0.1))
    return told, found


def test_a_deferred_offer_is_repeated_seldom_and_without_its_chunks():
    told = deferred()
    assert not [kind for _ in range(9) for kind in to("d1", told.later(1.0))]
    (again,) = sent(told.later(1.0), "d1")
    assert isinstance(again, Offer) and (again.offer, again.waited_s) == (1, 10.0)
    assert not [kind for _ in range(9) for kind in to("d1", told.later(1.0))], "whether it is answered again or not"
    assert to("d1", told.later(1.0)) == ["Offer > d1"]


def test_it_moves_to_another_instance_that_has_memory_when_it_is_looked_at():
    none, much = {"d1": 9, "d2": 1}, {"d1": 0, "d2": 9}
    told, (first, second) = looking(none, much)
    assert not sent(first, "d1") and not sent(first, "d2"), "the instance that has deferred it knows when it has memory"
    assert to("d1", second) == ["Drop > d1"] and to("d2", second) == ["Offer > d2"]
    (moved,) = sent(second, kind=Offer)
    assert (moved.offer, moved.waited_s) == (2, 10.0)
    assert kinds(told.answer("a", grant)) == ["Chunk > d2"]


def test_all_that_are_deferred_look_for_memory_at_the_same_time():
    """Then the loads are read once for all. None looks later than `look_s`, here 5 s, after its deferral."""
    told = working("p1", "d1", "d2", load_s=0.5, heartbeat_s=1e6)
    told.view(d1=9, d2=0)
    for number, rid in enumerate("ab", 1):
        told.tell(assign(rid, prompt=8))
        assert to("d1", told.step()) == ["Offer > d1", "Chunk > d1"]
        told.tell(defer(rid, number))
        told.later(2.0)
        told.view(d1=9, d2=0)
    told.view(d1=0, d2=9)
    assert not sent(told.later(0.9), kind=Offer)
    assert [each.rid for each in sent(told.later(0.1), "d2", Offer)] == ["a", "b"]


@pytest.mark.parametrize("load", [Load(free_blocks=9, kept_blocks=8), Load(free_blocks=9, deferred_blocks=8)])
def test_it_does_not_move_for_memory_that_is_kept_or_that_others_wait_for(load):
    _, (actions,) = looking({"d1": 0, "d2": load})
    assert not sent(actions, "d1") and not sent(actions, "d2")


def test_it_does_not_move_while_nobody_reports_loads():
    """An instance without a report counts as empty, and so would each in turn."""
    told = deferred("d1", "d2")
    assert not [kind for _ in range(9) for iid in ("d1", "d2") for kind in to(iid, told.later(1.0))]


def test_it_is_repeated_when_there_is_nowhere_to_move():
    none = {"d1": 0, "d2": 0}
    told, seen = looking(none, none, none, none)
    assert [to("d1", actions) for actions in seen] == [[], ["Offer > d1"], [], ["Offer > d1"]]


def test_a_moved_offer_costs_no_announcement_before_its_grant():
    """The second chunk is computed while the offer is at d2, which defers it too."""
    told = working("p1", "d1", "d2", load_s=0.5, heartbeat_s=1e6)
    told.tell(assign("a", prompt=16))
    assert to("d1", told.step()) == ["Offer > d1", "Chunk > d1"]
    told.tell(defer("a"))
    told.later(4.9)
    told.view(d1=0, d2=9)
    told.later(0.1)
    assert not to("d2", told.tell(defer("a", 2, "d2")) + told.step())
    assert to("d2", told.answer("a", grant)) == ["Chunk > d2"] * 2 and not told.answer("a", grant)


def test_chunks_computed_while_the_offer_is_deferred_are_announced_after_the_grant():
    told = working("p1", "d1")
    told.tell(assign("a", prompt=16))
    told.step()
    told.tell(defer("a"))
    assert not to("d1", told.step())
    told.now += 0.25
    (rest,) = sent(told.tell(grant("a")), "d1")
    assert (rest.index, rest.start, rest.stop) == (1, 2, 4), "it keeps the first, which it was told of at once"
    assert rest.decoded_s == pytest.approx(0.25), "the limit of TPOT runs from its first token"


def test_a_grant_that_overtakes_the_deferral_counts():
    told = begin("d1")
    told.tell(grant("a"), defer("a"))
    assert to("d1", told.later(1.0)) == ["Chunk > d1"]


def test_a_deferral_that_was_lost_is_asked_for_again_and_one_that_is_repeated_changes_nothing():
    told = begin("d1")
    assert to("d1", told.later(1.0)) == ["Offer > d1", "Chunk > d1"]
    told.tell(defer("a"), defer("a"))
    assert not to("d1", told.later(1.0))


def test_a_connection_that_stands_again_repeats_a_deferred_offer_with_its_chunks():
    told = deferred()
    assert kinds(told.tell(PeerUp("d1"))) == ["Offer > d1", "Chunk > d1"]
    assert to("d1", told.later(1.0)) == ["Offer > d1", "Chunk > d1"], "nothing is known of it until the next answer"
    told.tell(defer("a"))
    assert not to("d1", told.later(1.0))


def test_a_deferred_offer_that_is_refused_later_goes_on(two):
    two.tell(defer("a"))
    assert kinds(two.tell(refuse("a"))) == ["Offer > d2"]


def test_a_request_that_ends_while_its_offer_is_deferred_is_withdrawn():
    told = deferred()
    (drop,) = sent(told.tell(close("a")), "d1")
    assert isinstance(drop, Drop) and not told.load().stalled and told.load().waiting == 0
    assert not to("d1", told.later(20.0))


@pytest.mark.parametrize("loads, asked", [({"d1": 1, "d2": 0}, ["d1"]), ({"d1": 0, "d2": 1}, ["d2"])])
def test_without_memory_anywhere_the_offer_goes_where_least_is_lacking(loads, asked):
    told = working("p1", "d1", "d2")
    told.view(**loads)
    told.tell(assign("a", prompt=8))
    actions = told.step()
    assert [peer for peer in ("d1", "d2") if sent(actions, peer, Offer)] == asked


def test_no_offer_is_made_while_all_have_deferred_as_much_as_they_may_and_the_wait_counts():
    told = working("p1", "d1", "d2")
    told.view(d1=FULL, d2=FULL)
    told.tell(assign("a", prompt=8))
    assert not sent(told.step(), kind=Offer) and told.load().stalled
    told.later(3.0)
    (made,) = sent(told.view(d1=FULL, d2=Load(free_blocks=1, deferred_blocks=8)), "d2", Offer)
    assert made.waited_s == 3.0


def test_memory_on_offer_counts_before_the_next_view():
    told = working("p1", "d1", "d2", slots=11)
    told.tell(assign("a", prompt=24), assign("b", prompt=24), assign("c", prompt=24))
    actions = [action for _ in range(4) for action in told.step()]
    assert [(each.rid, each.blocks) for each in sent(actions, kind=Offer)] == [("a", 6), ("b", 6)]
    assert sent(actions, "d1", Offer)[0].rid == "a" and sent(actions, "d2", Offer)[0].rid == "b"


def test_none_overtakes_another_that_found_no_place():
    told = working("p1", "d1", slots=11)
    told.view(d1=FULL)
    told.tell(assign("a", prompt=20), assign("b", prompt=4))
    assert not sent(told.step() + told.step() + told.step(), kind=Offer)
    assert [each.rid for each in sent(told.view(d1=10), kind=Offer)] == ["a", "b"]


def test_only_reachable_decode_instances_of_the_same_kind_are_asked():
    told = working("p1", instance("d1", "decode", fingerprint=fingerprint(dtype="f32")), "p2")
    told.meet(instance("d1", "decode", fingerprint=fingerprint(dtype="f32")), "p2", apart=["d2"])
    told.tell(assign("a", prompt=4))
    assert not sent(told.step(), kind=Offer)
    assert sent(told.tell(PeerUp("d2")), "d2", Offer)


def test_prompts_are_stalled_while_nobody_takes_the_first_of_them(offered):
    assert not offered.load().stalled  # it is on offer
    offered.tell(refuse("a"))
    assert offered.load().stalled
    offered.view(d1=9)  # it is asked again
    assert not offered.load().stalled


def test_prompts_are_stalled_while_an_offer_is_deferred(offered):
    offered.tell(defer("a"))
    assert offered.load().stalled
    offered.tell(grant("a"))
    assert not offered.load().stalled


def test_who_waits_for_a_prediction_is_not_stalled():
    told = working("p1", "d1", rules=Rules(length="noisy"))
    told.tell(assign("a", prompt=8))
    told.later()
    assert told.chunk() and not told.load().stalled


def test_patience_without_a_decode_instance_ends_for_each_at_its_time():
    told = begin(prompt=4)
    told.now = 5.0
    told.tell(assign("b", prompt=4))
    told.step()
    (failed,) = sent(told.later(5.2), kind=Failed)
    assert (failed.rid, failed.retry) == ("a", False) and "no decode instance could be reached for 10 s" in failed.why
    assert [each.rid for each in sent(told.later(5.2), kind=Failed)] == ["b"]


def test_patience_begins_anew_when_one_was_there():
    told = begin(prompt=4)
    told.now = 9.0
    told.meet("d1")
    told.tell(PeerDown("d1"))
    assert not sent(told.later(5.0), kind=Failed)


def test_what_fits_nowhere_fails_in_time_and_holds_nobody_up():
    """The only decode instance left is too small for "a": whoever comes after it goes on."""
    told = working("p1")
    told.meet(instance("d1", "decode", capacity=capacity(blocks=2)), apart=())
    told.tell(assign("a", prompt=7, max_tokens=20), assign("b", prompt=1, max_tokens=4))
    assert [each.rid for each in sent(told.step(), "d1", Offer)] == ["b"]
    (failed,) = sent(told.later(10.1), kind=Failed)
    assert failed.rid == "a" and "no decode instance" in failed.why


def test_without_views_who_refused_is_asked_again_as_often_as_views_would_come():
    """Nothing else tells that there is room again; a roster comes more seldom."""
    told = begin("d1", load_s=0.1, heartbeat_s=1e6)
    assert not sent(told.tell(refuse("a")) + told.later(0.09), "d1")
    (again,) = sent(told.later(0.2), "d1", Offer)
    assert again.offer == 2
    assert not sent(told.tell(refuse("a", 2)) + told.later(0.01), "d1")
    (again,) = sent(told.later(0.1), "d1", Offer)
    assert again.offer == 3
    told.tell(refuse("a", 3))
    told.view(d1=9)
    told.answer("a", refuse)
    assert not sent(told.later(0.2), "d1", Offer)  # with views, not before the next one


TIGHT = {"capacity": capacity(blocks=12, context=48), "slots": 6, "view_s": 2.0, "patience_s": 10.0}


def alone(*others, behind=None):
    """`a` and `a2` have six of twelve blocks here, which their decodes need too, six each."""
    told = working("m1", *others, **TIGHT)
    told.tell(assign("a", prompt=24, max_tokens=4, siblings=["a2"]), *[behind] * (behind is not None))
    told.step()
    return told


def test_a_prompt_that_only_its_own_instance_could_decode_but_not_beside_it_goes_elsewhere():
    told = alone("p1")
    assert not sent(told.later(1.9), kind=Failed)
    for failed in (both := sent(told.later(0.2), kind=Failed)):
        assert failed.retry and "not beside its own prefill" in failed.why
    assert [failed.rid for failed in both] == ["a", "a2"]


@pytest.mark.parametrize("comes", ["d1", "p1", None])
def test_with_nobody_else_to_prefill_it_such_a_prompt_waits_for_whoever_comes(comes):
    """Attempt after attempt here would use them all up long before the patience."""
    told = alone()
    assert not sent(told.later(9.0), kind=Failed)
    actions = told.meet(*[instance(comes, PHASES[comes[0]], capacity=TIGHT["capacity"])] if comes else [])
    if comes == "d1":
        assert sent(actions, "d1", Offer)
        return
    failed, _ = sent(told.later(1.5 if comes is None else 0.2), kind=Failed)
    assert failed.retry == (comes == "p1")
    assert "6 KV blocks" in failed.why and "transfer.slab_blocks to 9" in failed.why


@pytest.mark.parametrize(
    "behind, free",
    [
        (assign("b", 8, max_tokens=4, siblings=["b2"]), True),
        (assign("b", 32, max_tokens=1), True),
        (assign("b", 24, max_tokens=4, siblings=["b2"]), False),
    ],
    ids=["small", "ends", "alike"],
)
def test_such_a_prompt_does_not_hold_up_those_that_can_go_on(behind, free):
    """It has other attempts, behind them."""
    told = alone(behind=behind)
    assert not sent(told.later(1.9), kind=Failed) and told.run() == []
    failed = sent(told.later(0.2), kind=Failed)
    assert [(each.rid, each.retry) for each in failed] == [("a", True), ("a2", True)] * free
    assert told.run() == [("b", 0, 8)] * free  # now the slots are free


# ---------------------------------------------------------------- canaries


def canary(rid="c"):
    return assign(rid, prompt=1, max_tokens=2, ignore_eos=True, pinned="d2")


def test_a_canary_goes_to_its_instance_whatever_the_policy_says(two):
    two.tell(canary())
    (offer,) = sent(two.step(), "d2", Offer)
    assert offer.rid == "c" and offer.canary and not two.asked["a"][1].canary
    assert kinds(two.tell(grant("c", offer.offer, "d2"))) == []  # its chunk was announced with the offer
    two.take("c")
    assert to("d2", two.later(1.0)) == ["Chunk > d2"]  # until the broker closes it
    assert not to("d2", two.tell(close("c")))


def test_a_canary_is_prefilled_when_no_other_prompt_waits(two):
    two.tell(canary(), assign("b", prompt=8))
    assert [two.run() for _ in range(2)] == [[("b", 0, 8)], [("c", 0, 1)]]


def test_a_canary_that_is_refused_is_given_up_and_goes_nowhere_else(two):
    two.tell(canary())
    two.step()
    actions = two.tell(refuse("c", 2, "d2"))
    (failed,) = sent(actions, BROKER, Failed)
    assert (failed.rid, failed.avoid) == ("c", []) and not sent(actions, kind=Offer)
    assert two.holds() == [("a", "moving", 1)]


def test_a_canary_that_cannot_be_read_says_between_whom(two):
    two.tell(canary())
    two.step()
    (failed,) = sent(two.tell(unread("c", 2, "d2")), BROKER, Failed)
    assert failed.avoid == ["d2", "p1"] and two.heartbeat().unread_by == {"d2": "chunk 0 is lost"}


def test_a_canary_tries_an_instance_that_gets_nothing_else_and_brings_it_back(two):
    two.tell(canary("c1"))
    two.step()
    two.tell(unread("c1", 2, "d2"))
    two.tell(canary("c2"))  # at once, although the breaker pauses
    assert [each.rid for each in sent(two.step(), "d2", Offer)] == ["c2"]
    two.answer("c2", grant)
    two.take("c2")
    assert two.heartbeat().unread_by == {}


def test_a_deferred_canary_waits_where_it_is_and_holds_up_nobody(two):
    two.tell(canary())
    two.step()
    two.answer("c", defer)
    two.view(d1=9, d2=0)
    assert to("d2", two.later(1.0)) == ["Offer > d2", "Chunk > d2"] and not two.load().stalled
    two.tell(assign("b", prompt=8))
    assert [each.rid for each in sent(two.step(), "d1", Offer)] == ["b"]


def test_a_canary_is_given_up_with_its_instance(two):
    two.tell(canary())
    two.step()
    (failed,) = sent(two.tell(PeerDown("d2")), BROKER, Failed)
    assert failed.rid == "c" and not sent(two.later(1.0), "d2")


def test_a_canary_waits_behind_a_request_that_has_no_decode_instance():
    told = begin("d1", "d2")
    told.tell(refuse("a"), canary())
    told.answer("a", refuse)  # now all have refused it
    assert not sent(told.step(), "d2", Offer)
    (first, second) = sent(told.view(d1=9, d2=9), kind=Offer)
    assert (first.rid, second.rid) == ("a", "c")
