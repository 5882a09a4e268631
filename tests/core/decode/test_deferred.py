"""Offers for which a decode instance has no memory yet."""

import pytest

from tests.core.build import assign, chunk, close, drop, hand_over, instance, membership, offer, update_length
from tests.core.driver import working
from tests.core.reading import kinds, only, sent
from tetri.core.actions import Adopt, Broken, RequestRejected
from tetri.core.decode.deferred import LONG_S, LOOK, DeferredOffers
from tetri.request import LengthRange
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.handover import Defer, Grant, Landed, Refuse

NOW = 100.0


def waiting(rid, waited_s=0.0, blocks=1):
    return hand_over(offer(rid, 4 * blocks, waited_s=waited_s))


def entered(*requests, limit=1000, keep_s=30.0):
    """All at once."""
    deferred = DeferredOffers(limit, keep_s)
    for request in requests:
        assert deferred.enter(request, NOW, free=0)
        deferred.check()
    return deferred


def rids(requests):
    return "".join(request.offer.rid for request in requests)


# ---------------------------------------------------------------- the line


@pytest.mark.parametrize("came", ["abcd", "dcba", "bdac"])
def test_those_that_have_waited_longest_come_first_whenever_they_came(came):
    waited = {"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0}
    deferred = entered(*(waiting(rid, waited[rid]) for rid in came))
    assert rids(deferred.first(NOW)) == rids(deferred) == "abcd"


def test_of_those_that_have_waited_as_long_the_one_that_came_first_does():
    assert rids(entered(waiting("b"), waiting("a"), waiting("c", 1.0), waiting("d", 1.0))) == "cdba"


def test_some_are_tried_at_most():
    deferred = entered(*(waiting(f"{number},", LONG_S / 2 - number / 100) for number in range(LOOK + 3)))
    assert rids(deferred.first(NOW)) == "".join(f"{number}," for number in range(LOOK))


@pytest.mark.parametrize(
    "granted, tried",
    [("", "a"), ("a", "ab"), ("ab", "abcd"), ("abd", "abcd")],
    ids=["first waits", "second waits", "both go", "all that fit go"],
)
def test_none_overtakes_one_that_has_waited_long(granted, tried):
    """`a` and `b` have."""
    waited = {"a": LONG_S + 1, "b": LONG_S, "c": LONG_S - 0.1, "d": 0.0}
    deferred, seen = entered(*(waiting(rid, waited_s) for rid, waited_s in waited.items())), ""
    for each in deferred.first(NOW):
        seen += each.offer.rid
        if each.offer.rid in granted:
            deferred.leave(each)
    assert seen == tried and rids(deferred) == "".join(rid for rid in "abcd" if rid not in granted)


def test_a_canary_comes_last_and_only_when_no_other_offer_waits():
    canaries = [hand_over(offer(rid, 4, canary=True, waited_s=9.0)) for rid in "xy"]
    deferred = entered(canaries[0], waiting("a"), canaries[1], waiting("b", 1.0))
    assert rids(deferred) == "baxy" and rids(deferred.first(NOW)) == "ba"
    seen = ""
    for each in deferred.first(NOW):
        seen += each.offer.rid
        deferred.leave(each)
    assert seen == "baxy"


@pytest.mark.parametrize("blocks", [1, 9])
@pytest.mark.parametrize(
    "there, free, enters", [(3, 0, True), (4, 0, False), (4, 1, True), (6, 2, False), (0, 0, True)]
)
def test_none_is_added_to_those_that_lack_the_limit_however_small_it_is(there, free, enters, blocks):
    deferred = DeferredOffers(4, 30.0)
    assert not there or deferred.enter(waiting("a", blocks=there), NOW, free=99)
    assert deferred.enter(waiting("b", blocks=blocks), NOW, free) == ("b" in deferred) == enters
    assert deferred.blocks == there + blocks * enters
    deferred.check()


def test_each_is_found_until_it_leaves():
    deferred, made = DeferredOffers(4, 30.0), waiting("a", blocks=3)
    assert "a" not in deferred
    deferred.enter(made, NOW, free=0)
    assert ("a" in deferred, [*deferred], len(deferred), deferred.blocks) == (True, [made], 1, 3)
    deferred.leave(made)
    assert ("a" in deferred, [*deferred], len(deferred), deferred.blocks) == (False, [], 0, 0)


def test_one_that_is_not_repeated_expires():
    a, b = waiting("a"), waiting("b")
    deferred = entered(a, b, keep_s=30.0)
    deferred.asked(b, NOW + 20.0)
    assert deferred.expired(NOW + 30.0) == [] and deferred.expired(NOW + 30.1) == [a]
    assert deferred.expired(NOW + 50.1) == [a, b]


def test_a_wrong_sum_is_found():
    deferred = entered(waiting("a", blocks=3))
    deferred.blocks -= 1
    with pytest.raises(Broken, match="2 blocks are deferred, counted otherwise"):
        deferred.check()


# ---------------------------------------------------------------- deferred, and granted later


A = offer("a", prompt=12, src="p2")
B = offer("b", prompt=12)


def full(*offers):
    """`a` has three of the five blocks that waiting requests may have. These others are deferred."""
    told = working("d1", "p1", "p2")
    told.tell(A)
    told.step()
    for made in offers or [B]:
        assert kinds(told.tell(made)) == [f"Defer > {made.src}"]
    return told


def deferred(told):
    return told.load().deferred_blocks


@pytest.mark.parametrize(
    "freed",
    [
        close("a"),
        drop("a", src="p2"),
        RequestRejected("d:a:1:p2:1", "odd"),
        PeerDown("p2"),
        chunk("a", 0, 0, 3, token=5, src="p2"),  # it is admitted, and waits no longer
        chunk("a", 0, 0, 3, src="p2"),  # it is refused: the last chunk has no token
    ],
    ids=["closed", "dropped", "rejected", "lost", "landed", "misfit"],
)
def test_a_deferred_offer_is_granted_when_there_is_memory(freed):
    told = full()
    assert not sent(told.later(1.0), "p1", Grant) and deferred(told) == 3
    told.tell(freed)
    assert sent(told.later(), "p1") == [Grant(src="d1", incarnation=1, rid="b", attempt=1, offer=1)]
    assert deferred(told) == 0 and ("b", "moving", 0) in told.holds()


def test_it_is_granted_when_a_running_one_ends():
    told = working("d1", "p1").running("a", prompt=24, max_tokens=9)
    assert kinds(told.tell(offer("b", prompt=8, offer=2))) == ["Defer > p1"]
    assert not sent(told.step(), kind=Grant)
    told.step(a="stop")
    assert [each.rid for each in sent(told.later(), kind=Grant)] == ["b"]


def test_it_is_not_granted_while_the_batch_needs_the_memory_to_grow():
    """`a` has six of ten blocks at first, and two are kept for it. A preemption takes none of them away."""
    told = working("d1", "p1").running("a", prompt=20, max_tokens=9)
    told.tell(offer("b", prompt=12, offer=2))
    assert (told.load().free_blocks, told.load().kept_blocks, deferred(told)) == (4, 2, 3)
    assert not sent(told.step(preempted="a"), kind=Grant)
    told.tell(PeerUp("p1"))  # whatever makes it look again
    assert not sent(told.step(), kind=Grant) and deferred(told) == 3


def test_what_arrives_is_tried_behind_those_that_wait_already():
    """`b` does not fit, and has not waited for long: `c` is granted at once. Then `d` does not fit either."""
    told = full()
    assert kinds(told.tell(offer("c", prompt=8, offer=2))) == ["AddRequest", "Grant > p1"]
    assert kinds(told.tell(offer("d", prompt=4, offer=3))) == ["Defer > p1"]
    told.tell(close("c"))
    assert [each.rid for each in sent(told.later(), kind=Grant)] == ["d"]


def test_none_that_arrives_overtakes_one_that_has_waited_long_elsewhere():
    told = full(offer("b", prompt=12, waited_s=LONG_S))
    assert kinds(told.tell(offer("c", prompt=8, offer=2))) == ["Defer > p1"]
    told.tell(close("a"))
    assert [each.rid for each in sent(told.later(), kind=Grant)] == ["b", "c"]


def test_small_offers_do_not_keep_a_large_one_out_for_ever():
    """Two small requests of 2 blocks are always here, of the 5 that may be reserved: when one ends, another comes."""
    told, here, number = working("d1", "p1", "p2"), ["s1", "s2"], 2
    told.tell(offer("s1", prompt=8), offer("s2", prompt=8, offer=2))
    assert kinds(told.tell(offer("large", prompt=16, src="p2"))) == ["Defer > p2"]
    while "large" not in here:
        assert told.now < LONG_S + 2.0, "it never gets in"
        number += 1
        actions = told.tell(close(here.pop(0)), offer(f"s{number}", prompt=8, offer=number)) + told.later(0.5)
        if told.most is not None:
            told.step()
        here += [rid for rid in dict.fromkeys(each.rid for each in sent(actions, kind=Grant)) if rid not in here]
    assert told.now >= LONG_S and deferred(told) > 0, "small ones wait behind it"


def test_small_offers_do_not_keep_a_large_one_out_of_the_line():
    """The line is full of small ones. When there is a place in it, who comes gets it, of whatever size."""
    told = full(*(offer(f"s{n}", prompt=12, offer=n) for n in range(1, 5)))
    (refused,) = sent(told.tell(offer("large", prompt=28, src="p2", waited_s=9.0)))
    assert isinstance(refused, Refuse) and refused.why == "offers of 12 blocks are deferred, that is enough"
    told.tell(close("s1"))
    assert kinds(told.tell(offer("large", prompt=28, src="p2", offer=2, waited_s=9.0))) == ["Defer > p2"]
    assert deferred(told) == 16
    told.tell(close("a"))
    assert [each.rid for each in sent(told.later(), kind=Grant)] == ["large"]


# ---------------------------------------------------------------- the chunks


def test_chunks_that_were_announced_before_are_fetched_after_the_grant():
    """They are not announced again."""
    told = full()
    assert not told.tell(chunk("b", 0, 0, 1), chunk("b", 1, 1, 3, token=5), chunk("b", 0, 0, 1))
    told.tell(close("a"))
    assert kinds(told.step())[-5:] == ["Adopt", "Adopt", "Landed > p1", "Landed > p1", "Staged > broker"]
    (again,) = sent(told.tell(chunk("b", 1, 1, 3, token=5)), "p1")
    assert isinstance(again, Landed) and again.index == 1


def test_chunks_of_another_offer_are_refused_and_the_deferred_one_stays():
    told = full()
    (refused,) = sent(told.tell(chunk("b", 0, 0, 1, offer=2)))
    assert refused.why == "no such offer here" and refused.offer == 2 and deferred(told) == 3


def test_a_chunk_that_cannot_belong_to_it_ends_a_deferred_offer():
    told = full()
    (refused,) = sent(told.tell(chunk("b", 0, 0, 4)))
    assert isinstance(refused, Refuse) and "does not fit its offer" in refused.why and deferred(told) == 0


def test_what_was_announced_for_an_earlier_offer_does_not_count_for_a_later_one():
    told = full()
    told.tell(chunk("b", 0, 0, 3, token=5), offer("b", prompt=12, offer=2), close("a"))
    assert not only(told.step(), Adopt)


# ---------------------------------------------------------------- the same again, others, the end


@pytest.mark.parametrize(
    "event, says, left",
    [
        (B, ["Defer > p1"], 3),
        (drop("b"), [], 0),
        (drop("b", offer=2), [], 3),
        (drop("b", src="p2"), [], 3),
        (close("b"), [], 0),
        (close("b", attempt=0), [], 3),
        (PeerDown("p1"), [], 0),
        (PeerDown("p2"), ["CancelRequest"], 3),
        (membership(9, instance("p2", "prefill"), instance("d1", "decode")), ["Disconnect"] * 2, 0),
        (offer("b", prompt=12, offer=2), ["Defer > p1"], 3),
        (offer("b", prompt=12, src="p2"), ["Defer > p2"], 3),
        (offer("b", prompt=12, attempt=2), ["Defer > p1"], 3),
        (offer("b", prompt=8, attempt=2), ["AddRequest", "Grant > p1"], 0),
        (offer("b", prompt=44, attempt=2), ["Refuse > p1"], 0),
    ],
)
def test_what_becomes_of_a_deferred_offer(event, says, left):
    told = full()
    assert kinds(told.tell(event)) == says and deferred(told) == left
    assert told.load().waiting == (left > 0) + ("a" in [rid for rid, *_ in told.holds()]) + (says[:1] == ["AddRequest"])


@pytest.mark.parametrize(
    "newer, why", [({"offer": 2}, "a later offer is here"), ({"attempt": 2}, "a later attempt is here")]
)
def test_an_earlier_offer_that_comes_late_changes_nothing(newer, why):
    told = full(offer("b", prompt=12, **newer))
    (refused,) = sent(told.tell(B))
    assert (refused.why, refused.attempt, refused.offer) == (why, 1, 1)
    told.tell(close("a"))
    (granted,) = sent(told.later(), "p1")
    assert {name: getattr(granted, name) for name in newer} == newer


def test_a_later_attempt_of_a_granted_one_waits_behind_those_that_came_before_it():
    told = full()
    actions = told.tell(offer("a", prompt=16, attempt=2))
    assert kinds(actions) == ["CancelRequest", "AddRequest", "Grant > p1", "Defer > p1"]
    assert [each.rid for each in sent(actions)] == ["b", "a"] and deferred(told) == 4


def test_a_better_length_counts_for_a_deferred_offer():
    told = full(offer("b", prompt=12, max_tokens=24, length=LengthRange(low=1, high=2)))
    growth = told.load().growth_blocks
    told.tell(update_length("b", LengthRange(low=20, high=24), offer=2))
    assert told.load().growth_blocks == growth
    told.tell(update_length("b", LengthRange(low=20, high=24)))
    more = told.load().growth_blocks
    assert more > growth
    told.tell(offer("b", prompt=12, max_tokens=24, length=LengthRange(low=8, high=9)))  # that was lost, it is newer
    assert growth < told.load().growth_blocks < more


def test_an_offer_that_is_not_repeated_is_refused_after_a_while():
    """`b` has waited for long: as long as it is here, `c`, which would fit, must not overtake it."""
    told = full(offer("b", prompt=12, waited_s=LONG_S), offer("c", prompt=8, offer=2))
    told.later(20.0)
    assert kinds(told.tell(offer("c", prompt=8, offer=2))) == ["Defer > p1"]
    assert not sent(told.later(10.0), kind=Refuse)
    actions = told.later(0.1)
    (refused,) = sent(actions, kind=Refuse)
    assert (refused.rid, refused.why) == ("b", "the offer was not repeated")
    assert [each.rid for each in sent(actions, "p1", Grant)] == ["c"] and deferred(told) == 0


def test_the_next_one_is_deferred_again_with_each_heartbeat():
    """So that a prefill instance whose Drop was lost sends another: the next one may hold up the rest."""
    told = full(B, offer("c", prompt=12, src="p2"))
    assert [(each.rid, each.offer) for each in sent(told.later(1.0), kind=Defer)] == [("b", 1)]
    told.tell(drop("b"))
    assert [each.rid for each in sent(told.later(1.0), kind=Defer)] == ["c"]


# ---------------------------------------------------------------- on offer to itself


def test_an_instance_that_does_both_defers_its_own_prompts_of_several_choices():
    told = working("m1", slots=11)
    told.tell(offer("x", prompt=12, src="d9"))
    told.step()
    told.tell(assign("a", prompt=12, siblings=["b"]))
    told.step()
    told.step()
    load = told.load()
    assert (load.deferred_blocks, load.stalled, load.waiting) == (6, True, 3)
    assert not sent(told.later(5.0), kind=Defer), "it is told so directly"
    told.tell(close("x"))
    for _ in range(3):
        told.run()
    assert ("a", "decode") in [each[:2] for each in told.holds()] and told.load().deferred_blocks == 0


def test_a_canary_is_not_granted_while_a_real_offer_waits():
    """It would fit, and `b` does not."""
    told = full()
    assert kinds(told.tell(offer("c", prompt=1, offer=2, canary=True))) == ["Defer > p1"]
    told.tell(close("b"))
    assert [each.rid for each in sent(told.later(), kind=Grant)] == ["c"]
