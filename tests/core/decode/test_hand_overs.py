"""Hand-overs from the offer to their release: reserving, deferring, chunks, letting go."""

import pytest

from tests.core.build import (
    capacity,
    chunk,
    close,
    drop,
    fingerprint,
    instance,
    membership,
    offer,
    reach,
)
from tests.core.driver import working
from tests.core.reading import kinds, only, sent
from tetri.core.actions import BROKER, CancelRequest, RequestRejected
from tetri.policy.rules import Rules
from tetri.request import LengthRange
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.handover import Drop, Grant, Landed, Offer, Refuse
from tetri.wire.messages import Close

KEY = "d:r:1:p1:1"


def begin(**changes):
    return working("d1", "p1", "p2", **changes)


@pytest.fixture
def told():
    return begin()


def why(actions):
    (refused,) = sent(actions, kind=Refuse)
    return refused.why


def free(told):
    return told.load().free_blocks


# ---------------------------------------------------------------- offers


A = offer("a", prompt=12)
LATER = [offer("r", prompt=8, attempt=2)]


@pytest.mark.parametrize(
    "before, event, says, free_blocks",
    [
        ([], offer("r", prompt=14, output=[5, 6]), ["AddRequest", "Grant > p1"], 6),
        ([offer("r", prompt=8)], offer("r", prompt=8), ["Grant > p1"], 8),
        ([offer("r", prompt=8)], offer("r", prompt=8, offer=2), ["CancelRequest", "AddRequest", "Grant > p1"], 8),
        ([offer("r", prompt=8)], offer("r", prompt=8, attempt=2), ["CancelRequest", "AddRequest", "Grant > p1"], 8),
        ([offer("r", prompt=8)], offer("r", prompt=8, src="p2"), ["CancelRequest", "AddRequest", "Grant > p2"], 8),
        (LATER, offer("r", prompt=8), "a later attempt is here", 8),
        ([offer("r", prompt=8, offer=2)], offer("r", prompt=8), "a later offer is here", 8),
        ([A], offer("b", prompt=12), ["Defer > p1"], 7),  # 3 of 5 blocks for waiting requests are taken
        ([A], offer("b", prompt=8), ["AddRequest", "Grant > p1"], 5),
        ([], offer("b", prompt=24), ["AddRequest", "Grant > p1"], 4),  # one alone may be larger
        ([], offer("r", prompt=8, fingerprint=fingerprint(dtype="f32")), "dtype differs: u8 and f32", 10),
        ([], offer("r", prompt=0, blocks=0), "0 tokens are not 0 blocks", 10),
        ([], offer("r", prompt=8, blocks=3), "8 tokens are not 3 blocks", 10),
        ([], offer("r", prompt=40, max_tokens=1), "41 tokens do not fit here", 10),
        ([], offer("r", prompt=8, max_tokens=33), "41 tokens do not fit here", 10),
        ([offer("r", prompt=8)], RequestRejected(KEY, "odd"), "odd", 10),
        ([offer("r", prompt=8)], drop("r", offer=2), [], 8),
        ([offer("r", prompt=8)], drop("r"), ["CancelRequest"], 10),
        ([offer("r", prompt=8)], chunk("r", 0, 0, 1, offer=2), "no such offer here", 8),
    ],
)
def test_offers_are_answered_and_reserve_memory(told, before, event, says, free_blocks):
    told.tell(*before)
    actions = told.tell(event)
    assert (kinds(actions) if isinstance(says, list) else why(actions)) == says and free(told) == free_blocks


def test_an_instance_without_a_common_path_is_refused(told):
    told.meet(instance("p1", "prefill", reach=reach("p1", host="elsewhere")))
    assert "no path to its KV" in why(told.tell(offer("r", prompt=8)))


def test_what_has_all_landed_is_granted_under_any_number_and_cannot_be_dropped(told):
    told.land()
    assert kinds(told.tell(offer("r", prompt=8, offer=7))) == ["Grant > p1"]
    (answer,) = sent(told.tell(chunk("r", 0, 0, 2, offer=7)))
    assert isinstance(answer, Landed) and answer.offer == 7
    assert not told.tell(drop("r", offer=7)) and told.load().landed == 1
    assert why(told.tell(offer("r", prompt=8))) == "a later offer is here"
    (answer,) = sent(told.tell(chunk("r", 0, 0, 2, offer=7)))
    assert isinstance(answer, Landed) and answer.offer == 7


def test_a_reservation_is_never_larger_than_what_is_free(told):
    told.running("a", prompt=12)
    assert kinds(told.tell(offer("b", prompt=28, offer=2))) == ["Defer > p1"] and free(told) == 6


# ---------------------------------------------------------------- memory that is kept, or waited for


def largest(told):
    """How many blocks an offer may ask for just now."""
    granted = 0
    for blocks in range(1, 11):
        actions = told.tell(offer("probe", prompt=4 * blocks, offer=90 + blocks, max_tokens=1))
        granted = blocks if sent(actions, kind=Grant) else granted
        told.tell(close("probe"))
    return granted


@pytest.mark.parametrize("admit, most", [("peak", 3), ("greedy", 5), ("reserve_static", 5), ("reserve_dynamic", 5)])
def test_an_offer_leaves_to_the_batch_what_it_will_need(admit, most):
    """Of 10 blocks the running one has 3, for 9 tokens. It will have 7, for 28: `peak` has admitted it for these. The
    others keep two blocks for each running request."""
    told = begin(rules=Rules(admit=admit, admit_end="high"), reserve_share=1.0)
    told.running("a", prompt=7, max_tokens=21)
    assert kinds(told.tell(offer("b", prompt=4 * most + 1, offer=2))) == ["Defer > p1"]
    assert free(told) == 7 and told.load().kept_blocks == 7 - most
    told.tell(close("b"))
    assert largest(told) == most


@pytest.mark.parametrize("admit, kept", [("peak", 5), ("greedy", 2)])
def test_what_the_next_to_run_will_need_is_kept_too_when_nothing_runs(admit, kept):
    """Its KV has landed: 8 tokens in 2 blocks, which will be 28 in 7."""
    told = begin(rules=Rules(admit=admit, admit_end="high"), reserve_share=1.0)
    told.land("a", "b", prompt=7, max_tokens=21)
    told.tell(close("b"))
    assert (free(told), told.load().kept_blocks) == (8, kept)


def test_what_the_batch_has_taken_is_not_kept_for_it_any_more():
    """It will have 7 of 10 blocks, of which it has 3, 5, and then none; none is free for others but three."""
    told = begin(rules=Rules(admit="peak", admit_end="high"), reserve_share=1.0)
    told.running("a", prompt=7, max_tokens=21)
    for _ in range(8):
        told.step()
    assert (free(told), largest(told)) == (5, 3)
    told.tell(close("a"))
    assert largest(told) == 9  # and one token more


# ---------------------------------------------------------------- chunks


def test_chunks_before_and_after_the_blocks_are_there(told):
    told.tell(offer("y", prompt=4, src="p2"), offer("r", prompt=16))
    assert not told.tell(chunk("r", 0, 0, 1))
    assert kinds(told.step())[1:] == ["Adopt", "Landed > p1"]
    actions = told.tell(chunk("r", 1, 1, 3), chunk("r", 2, 3, 4, token=5))
    assert kinds(actions) == ["Adopt", "Landed > p1"] * 2 + ["Staged > broker"]
    load = told.load()
    assert (load.waiting, load.landed, load.running) == (2, 1, 0)
    assert sent(actions, BROKER)[0].stage == "waiting" and told.holds() == [("y", "moving", 0), ("r", "waiting", 1)]


# ---------------------------------------------------------------- letting go


@pytest.mark.parametrize("gone", [PeerDown("p1"), membership(9, instance("p2", "prefill"), instance("d1", "decode"))])
def test_a_lost_prefill_instance_takes_what_it_had_not_sent_along(told, gone):
    told.land("a", prompt=4)
    told.tell(offer("b", prompt=4, offer=2), offer("c", prompt=4, src="p2"))
    assert only(told.tell(gone), CancelRequest) == [CancelRequest("d:b:1:p1:2")] and told.load().waiting == 2


def test_a_prefill_instance_that_is_back_hears_all_again_and_beats_remind_it_of_what_is_not_all_there(told):
    told.land("a", prompt=4)
    told.tell(offer("b", prompt=4, offer=2))
    assert kinds(told.tell(PeerUp("p1"))) == ["Grant > p1", "Landed > p1", "Grant > p1"]
    assert [grant.rid for grant in sent(told.later(0.1), "p1", Grant)] == ["b"]
    assert told.holds() == [("a", "decode", 1), ("b", "moving", 0)]
    told.step(a="stop")
    assert kinds(told.tell(PeerUp("p1"))) == ["Grant > p1"]  # of what has ended nobody asks


@pytest.mark.parametrize("until", ["offered", "landed", "running", "ended"])
def test_closing_in_every_stage(told, until):
    if until == "offered":
        told.tell(offer("r", prompt=8))
    else:
        told.land()
    if until in ("running", "ended"):
        told.step(**{"r": "stop"} if until == "ended" else {})
    assert not told.tell(close("r", attempt=0))
    assert kinds(told.tell(close("r"))) == ([] if until == "ended" else ["CancelRequest"])
    assert free(told) == 10 and not told.holds()


# ---------------------------------------------------------------- requests that stay


def at_home(offer_made, *before):
    """The hand-overs of an instance that does both, on which a prefill of such an offer runs."""
    told = working("m1", capacity=capacity(blocks=12, context=48))
    told.tell(*before)
    told.core.ledger.allocate("p", offer_made.blocks)
    return told, told.core.hand_overs


def load_of(told):
    """Without a check of the whole worker, which knows of no such prefill."""
    return told.core.reporter.load()


HERE = offer("r", prompt=8, src="m1", length=LengthRange(low=4, high=6))


@pytest.mark.parametrize(
    "before, says, refused",
    [
        ([], [], False),
        ([offer("x", prompt=40, src="d9")], [], False),  # it needs no memory of its own
        ([offer("r", prompt=8, attempt=0, src="d9")], ["CancelRequest"], False),
        ([offer("r", prompt=8, attempt=1, src="d9")], None, True),
        ([offer("r", prompt=8, attempt=2, src="d9")], None, True),
    ],
    ids=["alone", "beside a large one", "after an earlier attempt", "after the same", "after a later one"],
)
def test_one_may_stay_unless_it_is_here_already(before, says, refused):
    told, hand_overs = at_home(HERE, *before)
    found = hand_overs.stay(HERE)
    assert (found is None) == refused
    if found is not None:
        assert (found[0], kinds(found[1])) == ("d:r:1:m1:1", says)


@pytest.mark.parametrize("changes", [{"blocks": 3}, {"max_tokens": 99}, {"fingerprint": fingerprint(dtype="f32")}])
def test_one_that_can_never_run_here_may_not_stay(changes):
    told, hand_overs = at_home(HERE)
    assert hand_overs.stay(offer("r", prompt=8, src="m1", **changes)) is None and load_of(told).waiting == 0


def test_one_that_stays_counts_as_waiting_with_its_growth_and_asks_for_no_memory():
    told, hand_overs = at_home(HERE)
    before = load_of(told)
    hand_overs.stay(HERE)
    load = load_of(told)
    assert (load.waiting, load.landed, load.growth_blocks) == (1, 0, 2)  # 16 tokens
    assert (load.free_blocks, load.deferred_blocks) == (before.free_blocks, 0)
    assert not sent(hand_overs.resend_answers()), "it is granted"


def test_once_its_prefill_has_ended_it_waits_for_admission_with_the_blocks_of_its_prompt():
    told, hand_overs = at_home(HERE)
    key, _ = hand_overs.stay(HERE)
    told.core.ledger.hand_on("p", key)
    (staged,) = sent(hand_overs.land(key, 7), BROKER)
    assert (staged.rid, staged.stage, staged.peer) == ("r", "waiting", "m1")
    assert (load_of(told).landed, load_of(told).waiting, load_of(told).free_blocks) == (1, 1, 10)
    assert kinds(hand_overs.close("r", 1)) == ["CancelRequest"] and load_of(told).free_blocks == 12


@pytest.mark.parametrize("event", [close("r"), drop("r", src="m1"), offer("r", prompt=8, attempt=2, src="d9")])
def test_until_then_whatever_ends_it_leaves_the_memory_to_its_prefill(event):
    told, hand_overs = at_home(HERE)
    hand_overs.stay(HERE)
    match event:
        case Close():
            actions = hand_overs.close(event.rid, event.attempt)
        case Drop():
            actions = hand_overs.drop(event)
        case _:
            actions = hand_overs.offer(event, told.now, None)
    assert CancelRequest("d:r:1:m1:1") in actions and "p" in told.core.ledger
    taken = 2 if isinstance(event, Offer) else 0
    assert load_of(told).free_blocks == 12 - 2 - taken and load_of(told).waiting == bool(taken)
    refusals = [(message.src, message.attempt) for message in sent(actions, "m1", Refuse)]
    assert refusals == [("m1", 1)] * bool(taken), "its prefill ends too"
