"""Choices that share a prefill: computed once, offered once, and reported each by itself."""

import pytest

from tests.core.build import (
    assign,
    capacity,
    close,
    grant,
    landed,
    refuse,
    resend,
)
from tests.core.driver import working
from tests.core.reading import kinds, only, sent
from tetri.core.actions import BROKER, AddRequest, CancelRequest
from tetri.request import Stage
from tetri.wire.handover import Chunk, Drop, Offer
from tetri.wire.messages import Failed, Staged, Tokens

OTHERS = ("a.1", "a.2")
LARGE = capacity(blocks=60, context=200, chunk_tokens=40)


def prefiller(*decoders, **changes):
    return working("p1", *(decoders or ("d1",)), **{"capacity": LARGE, "slots": 30, **changes})


def three(**changes):
    """Choices `a`, `a.1` and `a.2` of a prompt of two blocks."""
    return assign("a", prompt=8, siblings=OTHERS, **{"temperature": 1.0, "seed": 0, **changes})


def staged(actions):
    return [(each.rid, each.stage) for each in sent(actions, BROKER, Staged)]


def held(told):
    return [hold.rid for hold in told.core.prefill.holds()]


def first_tokens(actions):
    items = [item for each in sent(actions, BROKER, Tokens) for item in each.items]
    return {item.rid: (item.ids, item.end and item.end.reason) for item in items}


def computed(told, message=None, **ends):
    told.tell(message or three())
    return told.step(**ends)


def test_one_engine_request_computes_them_and_each_is_reported():
    told = prefiller()
    actions = told.tell(three()) + told.later()
    (added,) = only(actions, AddRequest)
    assert (added.request.key, added.request.siblings) == ("p:a:1", (("p:a.1:1", 1), ("p:a.2:1", 2)))
    assert staged(actions) == [(rid, Stage.PREFILL) for rid in ("a", *OTHERS)]
    assert told.chunk() == [("a", 0, 8)]
    (made,) = sent(actions, "d1", Offer)
    assert (made.rid, made.blocks) == ("a", 2) and [(each.rid, each.seed) for each in made.siblings] == [
        ("a.1", 1),
        ("a.2", 2),
    ]
    actions = told.step()
    assert first_tokens(actions) == {"a": ([7], None), "a.1": ([8], None), "a.2": ([9], None)}
    assert staged(actions) == [(rid, Stage.MOVING) for rid in ("a", *OTHERS)]
    (last,) = sent(actions, "d1", Chunk)
    assert (last.stop, last.tokens) == (2, [7, 8, 9])
    assert told.holds() == [(rid, "moving", 1) for rid in ("a", *OTHERS)]


def test_each_is_closed_by_itself_and_the_last_takes_the_request_along():
    told = prefiller()
    computed(told)
    told.answer("a", grant)
    assert told.tell(close("a")) == [] and held(told) == [*OTHERS]
    assert told.tell(close("a.2")) == [] and held(told) == ["a.1"]
    assert kinds(told.tell(close("a.1"))) == ["Drop > d1", "Free"]
    assert told.holds() == [] and not told.core.prefill.choices


def test_close_of_those_that_landed_drops_nothing():
    told = prefiller()
    computed(told)
    told.take("a")
    assert [told.tell(close(rid)) for rid in (*OTHERS, "a")] == [[], [], []]


@pytest.mark.parametrize("gone", ["a", "a.1"])
def test_one_that_is_closed_while_it_waits_or_computes_is_not_reported(gone):
    told = prefiller()
    told.tell(three(), close(gone))
    actions = told.later()
    assert gone not in dict(staged(actions)) and len(staged(actions)) == 2
    (made,) = sent(actions, "d1", Offer)
    rest = [rid for rid in ("a", *OTHERS) if rid != gone]
    assert [made.rid, *(each.rid for each in made.siblings)] == rest
    assert made.sampling.seed == (1 if gone == "a" else 0)
    actions = told.step()
    assert [*first_tokens(actions)] == rest
    (last,) = sent(actions, "d1", Chunk)
    assert last.rid == made.rid and last.tokens == ([8, 9] if gone == "a" else [7, 9])


@pytest.mark.parametrize("ended", ["a", "a.2"])
def test_one_may_end_with_its_first_token_while_the_others_go_on(ended):
    told = prefiller()
    actions = computed(told, **{ended: "stop"})
    assert first_tokens(actions)[ended] == ([{"a": 7, "a.2": 9}[ended]], "stop")
    (last,) = sent(actions, "d1", Chunk)
    assert last.tokens == [None if ended == "a" else 7, 8, None if ended == "a.2" else 9]
    assert (ended, Stage.MOVING) not in staged(actions)
    assert sorted(told.holds()) == sorted((rid, "done" if rid == ended else "moving", 1) for rid in ("a", *OTHERS))
    (again,) = sent(told.tell(resend(ended, 0)), BROKER, Tokens)
    assert again.items[0].end.reason == "stop"
    told.tell(refuse("a"))
    (made,) = sent(told.meet("d1", "d2"), "d1", Offer)
    rest = [rid for rid in ("a", *OTHERS) if rid != ended]
    assert [made.rid, *(each.rid for each in made.siblings)] == rest, "the next offer is of the others alone"
    (last,) = sent(told.answer(made.rid, grant), "d1", Chunk)
    assert last.tokens == [token for rid, token in zip(("a", *OTHERS), (7, 8, 9), strict=True) if rid != ended]


def test_when_all_have_ended_nothing_more_is_sent():
    told = prefiller()
    actions = computed(told, **dict.fromkeys(("a", *OTHERS), "stop"))
    assert sent(actions, "d1", Drop) and not sent(actions, "d1", Chunk)
    assert told.holds() == [(rid, "done", 1) for rid in ("a", *OTHERS)] and told.core.prefill.slots_used == 0
    assert told.tell(close("a"), close("a.1"), close("a.2")) == [] and not told.core.prefill.choices


def test_the_last_that_went_on_is_closed_and_the_offer_goes():
    told = prefiller()
    computed(told, a="stop", **{"a.2": "stop"})
    assert kinds(told.tell(close("a.1"))) == ["Drop > d1", "Free"]
    assert held(told) == ["a", "a.2"]


def test_a_limit_of_one_token_ends_all():
    told = prefiller()
    actions = computed(told, three(max_tokens=1))
    assert {reason for _, reason in first_tokens(actions).values()} == {"length"} and not sent(actions, "d1")


def test_given_up_each_fails_and_one_that_has_ended_stays():
    told = prefiller()
    computed(told, **{"a.1": "stop"})
    told.answer("a", grant)
    made = told.asked["a"][1]
    told.tell(landed("a", 0, made.offer))
    actions = told.tell(refuse("a", made.offer, why="gone"))
    assert [(each.rid, each.retry) for each in sent(actions, BROKER, Failed)] == [("a", True), ("a.2", True)]
    assert told.holds() == [("a.1", "done", 1)]
    again = told.tell(three())
    assert [each.rid for each in sent(again, BROKER, Failed)] == ["a", "a.2"] and kinds(again) == [
        "Failed > broker"
    ] * 2
    assert told.tell(close("a.1")) == [] and not told.core.prefill.requests


def test_what_never_fits_fails_for_each():
    told = prefiller()
    actions = told.tell(assign("a", prompt=300, siblings=OTHERS))
    assert [each.rid for each in sent(actions, BROKER, Failed)] == ["a", *OTHERS]


def test_a_resent_assign_changes_nothing_and_one_that_knows_more_adds_the_rest():
    told = prefiller()
    told.tell(three())
    assert told.tell(three()) == []
    told.tell(assign("a.2", prompt=8, siblings=("a.3", "a.1"), temperature=1.0, seed=2))
    assert held(told) == ["a", *OTHERS, "a.3"]
    added = [each.request for each in only(told.later(), AddRequest)]
    assert [(each.key, each.sampling.seed, each.siblings) for each in added] == [
        ("p:a:1", 0, (("p:a.1:1", 1), ("p:a.2:1", 2))),
        ("p:a.3:1", 1, ()),
    ]


def test_a_later_attempt_of_one_leaves_the_others_as_they_are():
    told = prefiller()
    told.tell(three())
    told.later()
    assert only(told.tell(assign("a.1", prompt=8, attempt=2)), CancelRequest) == []
    told.step()
    assert held(told) == ["a", "a.2", "a.1"]


def test_a_replayed_assign_does_not_bring_a_closed_one_back_while_the_others_are_here():
    told = prefiller()
    told.tell(three(), close("a.1"))
    assert told.tell(three()) == [] and held(told) == ["a", "a.2"]
    assert told.tell(close("a"), close("a.2")) == []


def test_its_memory_is_asked_for_once_per_choice():
    told = prefiller("d1", "d2")
    told.view(d1=5, d2=6)
    actions = told.tell(three()) + told.later()
    assert sent(actions, "d2", Offer) and not sent(actions, "d1", Offer), "three times two blocks"
    pool = told.core.dispatcher.pool.columns
    assert (pool.free, pool.light) == ([5, 0], [0, 3])


def test_an_instance_that_could_never_hold_all_copies_is_not_asked():
    told = working("p1", "d1", capacity=LARGE, slots=30)  # d1 has ten blocks
    told.tell(assign("a", prompt=16, max_tokens=2, siblings=OTHERS))
    told.later()
    assert not told.asked and [*told.core.dispatcher.unplaceable] == ["p:a:1"]
    told.tell(close("a"))
    actions = told.meet("d1", "d2")
    assert [each.rid for each in sent(actions, None, Offer)] == ["a.1"], "two copies fit"
