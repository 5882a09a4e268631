"""Choices that share a hand-over: reserved together, fetched once, and each by itself once all KV has landed."""

import pytest

from tests.core.build import (
    assign,
    capacity,
    chunk,
    close,
    drop,
    offer,
    resend,
    siblings,
    update_length,
)
from tests.core.driver import working
from tests.core.reading import kinds, only, sent
from tetri.core.actions import (
    BROKER,
    AddRequest,
    AdmitRequest,
    Adopt,
    Adopted,
    Broken,
    CancelRequest,
    RequestRejected,
)
from tetri.request import LengthRange, Sampling, TokenLogprob
from tetri.wire.handover import Defer, Grant, Landed, Refuse
from tetri.wire.messages import Staged, Tokens

OTHERS = ("r.1", "r.2")
ALL = ("r", *OTHERS)
KEYS = tuple(f"d:{rid}:1:p1:1" for rid in ALL)
LARGE = capacity(blocks=60, context=200, max_batch=8)


def group(prompt=8, others=OTHERS, **changes):
    sampling = Sampling(max_tokens=changes.pop("max_tokens", 8), temperature=1.0, seed=0)
    return offer("r", prompt, sampling=sampling, siblings=siblings(*others), **changes)


def last(*tokens, index=0, start=0, stop=2, **changes):
    return chunk("r", index, start, stop, tokens=list(tokens or (5, 6, 7)), **changes)


def decoder(**changes):
    return working("d1", "p1", **{"capacity": LARGE, "reserve_share": 1.0, **changes})


def allocated(told, message=None):
    """All of a group, and the engine has its blocks."""
    told.tell(message or group())
    told.step()
    return told


def landed(told=None, message=None):
    told = allocated(told or decoder(), message)
    told.tell(last())
    return told


def ends(actions):
    items = [item for each in sent(actions, BROKER, Tokens) for item in each.items]
    return {item.rid: item.end.receipt for item in items if item.end is not None}


def holds(told):
    return [(hold.rid, hold.stage.value) for hold in told.core.decode.holds()]


def free(told):
    return told.core.ledger.free


def test_memory_is_reserved_for_all_copies_and_each_has_an_engine_request():
    told = decoder()
    actions = told.tell(group())
    assert kinds(actions) == ["AddRequest"] * 3 + ["Grant > p1"] and free(told) == 60 - 6
    requests = [each.request for each in only(actions, AddRequest)]
    assert [(each.key, each.sampling.seed) for each in requests] == list(zip(KEYS, (0, 1, 2), strict=True))
    assert told.tell(group()) and kinds(told.tell(group())) == ["Grant > p1"], "the same answer again"
    assert holds(told) == [(rid, "moving") for rid in ALL]
    assert told.core.decode.waiting() == 3


def test_a_chunk_is_fetched_once_for_all_and_all_land_together():
    told = allocated(decoder())
    actions = told.tell(chunk("r", 0, 0, 1), last(index=1, start=1))
    fetches = only(actions, Adopt)
    assert [(each.key, each.index, each.keys) for each in fetches] == [(KEYS[0], 0, KEYS), (KEYS[0], 1, KEYS)]
    assert [each.index for each in sent(actions, "p1", Landed)] == [0, 1]
    assert [(each.rid, each.stage) for each in sent(actions, BROKER, Staged)] == [(rid, "waiting") for rid in ALL]
    admitted = only(told.later(), AdmitRequest)
    assert [(each.key, each.token) for each in admitted] == list(zip(KEYS, (5, 6, 7), strict=True))
    assert kinds(told.tell(last(index=1, start=1))) == ["Landed > p1"], "a repeated chunk has landed"


def test_nothing_is_fetched_before_the_engine_has_the_blocks_of_all():
    told = decoder()
    told.tell(group(), last())
    assert not only(told.later(), Adopt)
    told.waiting.pop(KEYS[1])  # the engine is short of memory, and allocates this one later
    assert not only(told.step(), Adopt)
    told.waiting[KEYS[1]] = 0
    assert [each.keys for each in only(told.step(), Adopt)] == [KEYS]


def test_one_that_lacks_blocks_and_is_closed_holds_up_nobody():
    told = decoder()
    told.tell(group(), last())
    told.later()
    told.waiting.pop(KEYS[1])
    told.step()
    assert [each.keys for each in only(told.tell(close("r.1")), Adopt)] == [(KEYS[0], KEYS[2])]


def test_from_landing_on_each_lives_alone():
    told = landed()
    told.step()
    assert free(told) == 60 - 9, "each has grown by a block"
    actions = told.step(r="stop")
    assert [*ends(actions)] == ["r"] and free(told) == 60 - 6
    assert holds(told) == [("r", "done"), ("r.1", "decode"), ("r.2", "decode")]
    assert told.tell(close("r")) == [] and kinds(told.tell(last())) == ["Landed > p1"], "the hand-over is still known"
    assert kinds(told.tell(close("r.2"))) == ["CancelRequest"]
    (again,) = sent(told.tell(resend("r.1", 0)), BROKER, Tokens)
    assert again.items[0].ids == [6, 6, 6]
    told.tell(close("r.1"))
    assert free(told) == 60 and not told.core.decode.hand_overs.by_key
    assert kinds(told.tell(last())) == ["Refuse > p1"]


def test_moved_bytes_count_for_one_of_them():
    told = landed(message=group(max_tokens=3))
    told.step()
    receipts = ends(told.step())
    assert {rid: (each.kv_bytes, each.chunks, each.adopted) for rid, each in receipts.items()} == {
        "r": (64, 1, 8),
        "r.1": (0, 0, 8),
        "r.2": (0, 0, 8),
    }
    assert {each.transport for each in receipts.values()} == {"shm"}


@pytest.mark.parametrize("deferred", [True, False])
def test_those_that_ended_with_their_first_token_leave_with_the_last_chunk(deferred):
    told = decoder(capacity=capacity(blocks=16, context=60, max_batch=8))
    if deferred:
        told.tell(offer("x", 48, offer=9))  # twelve blocks
    told.tell(group())
    actions = told.tell(last(None, 6, None))
    assert free(told) == (4 if deferred else 14) and kinds(actions) == ["CancelRequest"] * (0 if deferred else 2)
    assert told.core.decode.hand_overs.deferred.blocks == (2 if deferred else 0)
    told.step()
    assert holds(told)[-1] == ("r.1", "waiting")
    told.step()
    assert holds(told)[-1] == ("r.1", "decode")


def test_a_receipt_counts_the_bytes_for_the_first_that_decodes():
    told = allocated(decoder(), group(max_tokens=2))
    told.tell(last(None, 6, 7))
    assert {rid: each.kv_bytes for rid, each in ends(told.step()).items()} == {"r.1": 64, "r.2": 0}


@pytest.mark.parametrize("tokens", [[5, 6], [5], [None, None, None], [5, 6, 7, 8], []])
def test_the_last_chunk_has_a_token_for_each(tokens):
    told = allocated(decoder())
    actions = told.tell(chunk("r", 0, 0, 2, tokens=tokens))
    assert kinds(actions) == ["Refuse > p1"] + ["CancelRequest"] * 3
    assert told.core.decode.hand_overs.kv_receive.counters["misfit"] == 1 and free(told) == 60


def test_they_wait_until_there_is_memory_for_all():
    told = decoder(capacity=capacity(blocks=13, context=40, max_batch=8))
    told.land("x", prompt=24)
    assert kinds(told.tell(group(offer=2))) == ["Defer > p1"] and told.core.decode.hand_overs.deferred.blocks == 6
    load = told.load()
    assert (load.deferred_blocks, load.waiting, load.free_blocks) == (6, 4, 7)
    told.tell(close("r.2"))
    assert told.core.decode.hand_overs.deferred.blocks == 4 and told.core.decode.waiting() == 3
    assert sent(told.later(), "p1", Grant), "there is memory for two of them, and for the growth of another"
    assert holds(told) == [("x", "decode"), ("r", "moving"), ("r.1", "moving")]


def test_a_deferred_group_is_withdrawn_as_one():
    told = decoder(capacity=capacity(blocks=12, context=40, max_batch=8))
    told.land("x", prompt=32)
    told.tell(group(offer=2))
    assert told.tell(drop("r", offer=2)) == [] and told.core.decode.hand_overs.deferred.blocks == 0
    assert told.core.decode.forecast.requests == 1


def test_copies_that_never_fit_are_refused():
    told = decoder(capacity=capacity(blocks=10, context=40))
    (refused,) = sent(told.tell(group(prompt=16)), "p1", Refuse)
    assert refused.why == "3 copies of 16 tokens do not fit here"
    assert sent(told.tell(group(prompt=12, offer=2)), "p1", Grant)


def test_one_that_is_closed_while_it_moves_frees_its_memory_and_the_others_land():
    told = allocated(decoder())
    told.far = True
    told.tell(last())
    assert kinds(told.tell(close("r"))) == ["CancelRequest"] and free(told) == 60 - 4
    actions = told.tell(Adopted(KEYS[0], 0, None, (KEYS[0],)))
    assert [each.rid for each in sent(actions, BROKER, Staged)] == [*OTHERS]
    told.step()
    assert {rid: each.kv_bytes for rid, each in ends(told.step(**{"r.1": "stop", "r.2": "stop"})).items()} == {
        "r.1": 64,
        "r.2": 0,
    }


def test_one_that_is_here_and_was_missed_is_an_error():
    told = allocated(decoder())
    told.far = True
    told.tell(last())
    with pytest.raises(Broken, match="has not taken chunk 0"):
        told.tell(Adopted(KEYS[0], 0, None, (KEYS[1],)))


def test_when_all_are_closed_nothing_is_left_and_the_fetch_counts_for_nobody():
    told = allocated(decoder())
    told.far = True
    told.tell(last(), *map(close, ALL))
    assert free(told) == 60 and not told.core.decode.hand_overs.by_key
    (refused,) = sent(told.tell(group()), "p1", Refuse)
    assert "still on its way" in refused.why
    assert told.tell(Adopted(KEYS[0], 0, "lost")) == []


def test_a_broken_transfer_is_refused_for_all_and_fetched_again_for_all():
    told = allocated(decoder())
    told.trouble = {0: ["flipped"] * 2}
    assert [each.keys for each in only(told.tell(last()), Adopt)] == [KEYS] * 3, "the third is right"
    told = allocated(decoder())
    told.trouble = {0: ["flipped"] * 3}
    actions = told.tell(last())
    assert kinds(actions)[-4:] == ["Refuse > p1"] + ["CancelRequest"] * 3 and free(told) == 60


def test_a_later_offer_replaces_the_choices_that_it_names():
    told = allocated(decoder())
    actions = told.tell(offer("r.1", 8, attempt=2, offer=2))
    assert [each.key for each in only(actions, CancelRequest)] == [KEYS[1]] and sent(actions, "p1", Grant)
    assert holds(told) == [("r", "moving"), ("r.2", "moving"), ("r.1", "moving")]
    (refused,) = sent(told.tell(group(offer=3)), "p1", Refuse)
    assert refused.why == "a later attempt is here"
    told.tell(last())
    assert holds(told) == [("r", "waiting"), ("r.2", "waiting"), ("r.1", "moving")]


def test_what_has_landed_goes_on_under_another_number_without_those_that_are_closed():
    told = landed()
    told.tell(close("r"))
    anew = offer("r.1", 8, offer=7, siblings=siblings("r.1", "r.2")[1:])
    assert kinds(told.tell(anew)) == ["Grant > p1"]
    assert kinds(told.tell(chunk("r.1", 0, 0, 2, tokens=[6, 7], offer=7))) == ["Landed > p1"]
    assert kinds(told.tell(last())) == ["Refuse > p1"] and len(told.core.decode.hand_overs.by_key) == 1


def test_an_offer_of_which_only_a_part_has_landed_replaces_nothing():
    told = landed()
    told.tell(close("r"))
    (refused,) = sent(told.tell(group(offer=2)), "p1", Refuse)
    assert refused.why == "KV of it is here under an earlier offer"
    assert holds(told) == [("r.1", "waiting"), ("r.2", "waiting")]


def test_lengths_are_those_of_all_until_they_have_landed_and_after():
    told = decoder()
    told.tell(group(max_tokens=60, length=LengthRange(low=0, high=20)))
    told.tell(update_length("r", LengthRange(low=20, high=40)))
    assert [each.length.high for each in told.core.decode.requests.values()] == [40] * 3
    told.tell(close("r"), update_length("r", LengthRange(low=40, high=60)))
    assert [each.length.high for each in told.core.decode.requests.values()] == [60] * 2


def test_a_lost_sender_takes_those_along_that_move():
    told = allocated(decoder())
    told.meet()
    assert free(told) == 60 and not told.core.decode.requests
    told = landed()
    told.meet()
    assert holds(told) == [(rid, "waiting") for rid in ALL]


def test_a_request_that_the_engine_rejects_is_refused_with_the_others_unless_they_have_landed():
    told = decoder()
    told.tell(group())
    assert kinds(told.tell(RequestRejected(KEYS[1], "odd"))) == ["Refuse > p1"] + ["CancelRequest"] * 3
    assert told.tell(RequestRejected(KEYS[2], "odd")) == []
    told = landed()
    assert kinds(told.tell(RequestRejected(KEYS[1], "odd"))) == ["CancelRequest"]
    assert holds(told) == [("r", "waiting"), ("r.2", "waiting")]


def test_a_reconnected_sender_hears_of_the_hand_over_once():
    told = landed()
    answers = told.core.decode.hand_overs.repeat("p1")
    assert kinds(answers) == ["Grant > p1", "Landed > p1"]
    assert sent(told.tell(group(offer=1)), "p1", Grant) and not sent(told.tell(group()), "p1", Defer)


def test_a_preempted_one_is_computed_again_alone():
    told = landed()
    told.step()
    told.step(preempted=["r.1"])
    told.step()
    receipts = ends(told.step(**dict.fromkeys(ALL, "stop")))
    assert {rid: (each.preempted, each.recomputed) for rid, each in receipts.items()} == {
        "r": (0, 0),
        "r.1": (1, 8),
        "r.2": (0, 0),
    }


def test_suspects_take_their_lone_steps_one_after_the_other():
    told = landed(message=group(alone=True))
    assert told.later() and told.core.decode.batch.lone.offer.rid == "r"
    assert [each.alone for each in told.core.decode.requests.values()] == [True] * 3


def test_log_probabilities_pass_through():
    told = allocated(decoder())
    said = [TokenLogprob(token, -0.5) for token in (5, 6, 7)]
    told.tell(last(*said))
    assert [each.token for each in only(told.later(), AdmitRequest)] == [5, 6, 7]
    (again,) = sent(told.tell(resend("r.2", 0)), BROKER, Tokens)
    assert again.items[0].ids == said[2:]


def test_a_mixed_instance_prefills_and_decodes_them_itself():
    told = working("m1", capacity=LARGE, slots=30)
    told.tell(assign("r", prompt=8, max_tokens=3, siblings=OTHERS, temperature=1.0, seed=0))
    receipts = ends([action for _ in range(3) for action in told.step()])
    assert {rid: (each.kv_bytes, each.transport) for rid, each in receipts.items()} == {
        "r": (64, "local"),
        "r.1": (0, "local"),
        "r.2": (0, "local"),
    }
