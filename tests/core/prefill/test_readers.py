"""KV that decode instances cannot read: who is offered it instead, who is tried again and when, and how it ends."""

import pytest

from tests.core.build import assign, capacity, close, grant, instance, landed, membership, refuse, unread
from tests.core.driver import working
from tests.core.reading import kinds, sent
from tetri.core.actions import BROKER
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.handover import Offer
from tetri.wire.load import Load
from tetri.wire.messages import Failed

FIRST_S = 0.4  # the longest first pause


def begin(*others, prompt=8, rid="a", **changes):
    """`a` is computed, and offered to the first decode instance."""
    told = roomy(*others, **changes)
    compute(told, rid, prompt=prompt)
    return told


def roomy(*others, **changes):
    return working("p1", *others, capacity=capacity(blocks=60, context=100), slots=60, offer_s=1e6, **changes)


def compute(told, *rids, prompt=8, **changes):
    told.tell(*(assign(rid, prompt=prompt, **changes) for rid in rids))
    return [action for _ in range(len(rids) * prompt // 8) for action in told.step()]


def offered(actions):
    return [(action.peer, action.message.rid) for action in actions if isinstance(getattr(action, "message", 0), Offer)]


def failed(actions):
    return [(each.rid, each.retry, each.avoid) for each in sent(actions, BROKER, Failed)]


@pytest.mark.parametrize("corrupt", [False, True])
def test_kv_that_one_instance_cannot_read_goes_to_another_and_keeps_its_attempt(corrupt):
    told = begin("d1", "d2")
    actions = told.tell(grant("a"), unread("a", corrupt=corrupt))
    assert kinds(actions) == ["Offer > d2"] and kinds(told.tell(grant("a", 2, "d2"))) == ["Chunk > d2"]
    assert offered(compute(told, "b")) == [("d2", "b")]  # and what follows goes there at once
    beat = told.heartbeat()
    assert beat.counters["unread_d1"] == 1
    assert beat.unread_by == {"d1": "chunk 0 is flipped" if corrupt else "chunk 0 is lost"}


def test_after_a_pause_one_request_tries_it_again_and_success_ends_the_matter():
    told = begin("d1", "d2")
    told.tell(unread("a"))
    told.now = FIRST_S
    assert offered(compute(told, "b", "c")) == [("d1", "b"), ("d2", "c")]  # one probe at a time
    told.answer("b", grant)
    told.take("b")
    assert told.heartbeat().unread_by == {} and offered(compute(told, "d")) == [("d1", "d")]


def test_a_probe_that_succeeds_shows_it_also_when_the_broker_hears_of_that_first():
    told = begin("d1", "d2")
    told.tell(unread("a"))
    told.now = FIRST_S
    assert offered(compute(told, "b")) == [("d1", "b")]
    told.answer("b", grant)
    told.tell(close("b"))
    assert [*told.heartbeat().unread_by] == ["d1"]
    told.tell(landed("b", 0, told.asked["b"][1].offer))
    assert told.heartbeat().unread_by == {}


def test_a_probe_that_fails_goes_elsewhere_and_the_next_pause_is_longer():
    told = begin("d1", "d2")
    told.tell(unread("a"))
    told.now = FIRST_S
    compute(told, "b")
    assert offered(told.answer("b", unread)) == [("d2", "b")]
    told.now += FIRST_S - 0.01
    assert offered(compute(told, "c")) == [("d2", "c")]
    told.now += FIRST_S + 0.01
    assert offered(compute(told, "d")) == [("d1", "d")]


@pytest.mark.parametrize("ends", ["refused", "lost"])
def test_a_probe_that_shows_nothing_is_followed_by_another(ends):
    told = begin("d1", "d2")
    told.tell(unread("a"))
    told.now = FIRST_S
    compute(told, "b")
    if ends == "refused":
        told.answer("b", refuse)
        told.view(d1=10, d2=10)
    else:
        told.tell(PeerDown("d1"), PeerUp("d1"))
    assert offered(compute(told, "c")) == [("d1", "c")]


def test_an_instance_that_was_restarted_is_as_any_other():
    told = begin("d1", "d2")
    told.tell(unread("a"))
    told.tell(membership(9, instance("p1", "prefill"), instance("d1", "decode", 2), instance("d2", "decode")))
    told.tell(PeerUp("d1"))
    assert told.heartbeat().unread_by == {} and offered(compute(told, "b")) == [("d1", "b")]


def test_kv_of_which_a_part_is_elsewhere_needs_another_attempt_that_avoids_the_instance():
    told = begin("d1", "d2", prompt=16)
    told.tell(grant("a"), landed("a", 0))
    assert failed(told.tell(unread("a"))) == [("a", True, ["d1"])]


@pytest.mark.parametrize("others", [("d1", "d2"), ("d1",)])
def test_what_failed_before_is_avoided_if_anybody_else_is_there(others):
    told = roomy(*others)
    assert offered(compute(told, "a", avoid=["d1"])) == [(others[-1], "a")]


def test_a_request_that_has_failed_is_no_probe_while_others_are_there():
    told = begin("d1", "d2")
    told.tell(unread("a"))
    told.now = FIRST_S
    assert offered(compute(told, "b", attempt=2, avoid=["d9"])) == [("d2", "b")]
    assert offered(compute(told, "c")) == [("d1", "c")]


def test_bytes_that_two_instances_find_wrong_are_computed_again_and_neither_is_blamed():
    told = begin("d1", "d2", "d3")
    told.tell(unread("a", corrupt=True))
    assert failed(told.tell(unread("a", 2, "d2", corrupt=True))) == [("a", True, ["d1", "d2", "p1"])]
    assert told.heartbeat().unread_by == {}


def test_wrong_bytes_are_computed_again_at_once_if_nobody_else_could_read_them():
    told = begin("d1")
    assert failed(told.tell(unread("a", corrupt=True))) == [("a", True, ["d1", "p1"])]
    told.now = FIRST_S
    compute(told, "a", attempt=2, avoid=["d1"])
    assert not told.tell(unread("a", 2, attempt=2, corrupt=True))  # the reader is wrong: it waits
    told.now += 2 * FIRST_S
    assert offered(told.later()) == [("d1", "a")]


def test_kv_that_two_instances_cannot_read_is_computed_by_another_prefill_instance():
    told = begin("d1", "d2", "d3", "p2")
    told.tell(unread("a"))
    assert failed(told.tell(unread("a", 2, "d2"))) == [("a", True, ["d1", "d2", "p1"])]


def test_a_prefill_instance_that_can_reach_nobody_passes_its_requests_on_soon():
    told = begin("d1", "p2", view_s=2.0)
    told.tell(unread("a"))
    told.tell(assign("b", prompt=8, avoid=["p2"]))  # it comes from there
    assert offered(told.later(1.9)) == [("d1", "a")] and not told.answer("a", unread)
    actions = told.later(0.2)
    assert failed(actions) == [("a", True, ["p1"])]
    assert sent(actions, kind=Failed)[0].why == "no decode instance can read KV of p1 (d1: chunk 0 is lost)"
    told.step()
    assert not sent(told.later(2.0), kind=Failed)


def test_not_while_the_decode_instances_can_read_nobody():
    told = begin("d1", "p2", view_s=2.0, load_s=0.1)
    told.tell(unread("a"))
    told.view(d1=Load(free_blocks=10, unread=3))
    assert not sent(told.later(1.0), kind=Failed)
    told.view(d1=Load(free_blocks=10, unread=4))
    assert not sent(told.later(1.5), kind=Failed)


def test_with_nobody_else_a_request_waits_tries_again_and_goes_on():
    told = begin("d1", patience_s=10.0)
    assert not told.tell(unread("a"))
    told.now = FIRST_S
    assert offered(told.later()) == [("d1", "a")]
    told.answer("a", grant)
    told.take("a")
    assert told.heartbeat().unread_by == {}


def test_with_nobody_else_it_ends_by_patience_with_the_reason_after_few_offers():
    told, offers, ends = begin("d1", patience_s=10.0), 1, []
    told.tell(unread("a"))
    while not ends and told.now < 20.0:
        actions = told.later(0.1)
        offers += len(offered(actions))
        ends = sent(actions, kind=Failed)
        if offered(actions):
            told.answer("a", unread)
    (end,) = ends
    why = "no decode instance could read KV of p1 for 10 s (d1: chunk 0 is lost)"
    assert (end.why, end.retry) == (why, False) and 10.0 < told.now < 10.3 and 3 < offers < 20
    assert told.heartbeat().counters["unread_d1"] == offers


def test_patience_counts_for_each_from_the_last_moment_at_which_it_might_have_been_read():
    """Of "a" it takes eight seconds to find out that it cannot be read; "b" is offered to nobody."""
    told, found = begin("d1", patience_s=10.0), {}
    told.now = 8.0
    told.tell(unread("a"))
    compute(told, "b")
    while len(found) < 2 and told.now < 30.0:
        actions = told.later(0.1)
        found.update({each.rid: told.now for each in sent(actions, kind=Failed)})
        for _, rid in offered(actions):
            told.answer(rid, unread if rid == "a" else refuse)
    assert 10.0 < found["a"] < 10.4 and 18.0 < found["b"] < 18.4


def test_an_instance_that_reports_to_read_nobody_is_avoided_before_it_is_tried():
    told = roomy("d1", "d2")
    told.view(d1=Load(free_blocks=10, unread=2), d2=10)
    assert offered(compute(told, "a")) == [("d2", "a")]
    assert told.heartbeat().unread_by == {"d1": "its reads of other instances' KV fail too"}
    told.view(d1=10, d2=10)
    assert offered(compute(told, "b")) == [("d1", "b")]
