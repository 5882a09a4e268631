"""A running request goes on at another decode instance: the source, the destination, and what goes wrong between."""

import pytest

from tests.core.build import capacity, chunk, close, defer, drop, grant, landed, migrate, offer, refuse, unread
from tests.core.driver import TOKEN, working
from tests.core.reading import kinds, only, sent
from tetri.core.actions import BROKER, AdmitRequest, Export, HoldRequest
from tetri.request import Receipt
from tetri.wire.events import PeerDown
from tetri.wire.handover import Chunk, Drop, Landed, Offer, Refuse
from tetri.wire.messages import NotMigrated, Staged, Tokens

LARGE = {"capacity": capacity(blocks=40, context=100, max_batch=4, chunk_tokens=32), "slots": 30}
BEFORE = Receipt(
    prompt_tokens=8,
    adopted=8,
    recomputed=0,
    kv_bytes=64,
    chunks=1,
    transport="shm",
    prefill_instance="p1",
    decode_instance="d2",
    preempted=0,
    refetched=0,
    local=0,
)


@pytest.fixture
def told():
    """It has one request, of a prompt of 8 tokens that are two blocks, and three output tokens."""
    made = working("d1", "p1", "d2", "d3", **LARGE).running("r", max_tokens=40)
    made.step()
    return made


def answers(make, *given, **changes):
    return make("r", *given, 1, "d2", 2, **changes)


def offered(told):
    """It is asked to go on at d2, which has granted it."""
    told.tell(migrate("r"), answers(grant))
    return told


def stopped(told):
    """The last chunk has left, with four tokens, and has not landed."""
    offered(told).step()
    told.tell(answers(landed, 0))
    told.later()
    assert "d:r:1:p1:1" in told.held
    return told


def waits(told):
    """Whether the source waits for the broker's word, in each heartbeat."""
    told.heartbeat()
    return [message.held for message in sent(told.later(told.own.heartbeat_s), kind=NotMigrated)] == [True]


# ---------------------------------------------------------------- the source


def test_it_is_offered_with_what_it_has_written_and_runs_until_that_is_granted(told):
    (made,) = sent(told.tell(migrate("r")), "d2", Offer)
    assert (made.rid, made.attempt, made.prompt, made.output) == ("r", 2, [1] * 8, [])
    assert made.written == [5, TOKEN] and made.ahead == 36 and made.blocks == 12
    assert made.receipt.adopted == 8 and made.receipt.prefill_instance == "p1"
    assert not only(told.step(), Export) and not told.held


def test_full_blocks_leave_while_it_runs_and_the_rest_when_it_has_stopped(told):
    """Between two steps no more than a chunk of a prompt has, and the last of its blocks only when it has stopped."""
    long = working("d1", "p1", "d2", **LARGE).running("r", prompt=40, max_tokens=40)
    long.tell(migrate("r"), answers(grant))
    first, second = long.step(), long.step()
    assert [(each.start, each.stop) for each in only([*first, *second], Export)] == [(0, 8), (8, 10)]
    assert not long.held
    actions = long.tell(answers(landed, 0), answers(landed, 1)) + long.later()
    assert [(each.start, each.stop) for each in only(actions, Export)] == [(10, 11)]
    assert only(actions, HoldRequest) == [HoldRequest("d:r:1:p1:1", True)]
    assert long.holds() == [("r", "waiting", 4)]


def test_the_last_chunk_has_all_its_tokens_and_the_broker_has_them_before():
    """Here a message of tokens has three of them, unless the request stops."""
    told = working("d1", "p1", "d2", **LARGE, stream_interval=3).running("r", max_tokens=40)
    told.tell(migrate("r"), answers(grant))
    (first,) = sent(told.step(), "d2", Chunk)
    assert (first.start, first.stop, first.written) == (0, 2, [])
    told.tell(answers(landed, 0))
    actions = told.later()
    (made,) = sent(actions, "d2", Chunk)
    assert (made.start, made.stop, made.written, made.tokens) == (2, 3, [5, TOKEN, TOKEN], [])
    (reported,) = sent(actions, BROKER, Tokens)
    assert [(item.start, item.ids) for item in reported.items] == [(1, [TOKEN, TOKEN])]


def test_nothing_is_computed_of_it_once_it_has_stopped_and_close_frees_it(told):
    assert stopped(told).holds() == [("r", "waiting", 4)]
    told.tell(answers(landed, 1), close("r"))
    told.later()
    assert told.holds() == [] and told.load().free_blocks == 40 and told.core.prefill.slots_used == 0


@pytest.mark.parametrize(
    "event",
    [answers(defer), answers(refuse), answers(unread), PeerDown("d2"), migrate("r", "d1")],
    ids=["deferred", "refused", "unread", "lost", "kept"],
)
def test_until_it_has_stopped_it_just_goes_on_here(event):
    long = working("d1", "p1", "d2", **LARGE).running("r", prompt=40, max_tokens=40)
    long.tell(migrate("r"))
    if not isinstance(event, type(answers(defer))):
        long.tell(answers(grant))
        long.step()
    actions = long.tell(event)
    assert bool(sent(actions, kind=NotMigrated)) == (event != migrate("r", "d1"))
    assert all(not each.held for each in sent(actions, kind=NotMigrated))
    long.step()
    assert long.holds()[0][1] == "decode" and long.core.prefill.slots_used == 0


@pytest.mark.parametrize("event", [answers(refuse), answers(unread), PeerDown("d2")], ids=["refused", "unread", "lost"])
def test_after_that_only_the_broker_lets_it_go_on(told, event):
    """The destination may have everything."""
    (asked,) = sent(stopped(told).tell(event), BROKER, NotMigrated)
    assert (asked.attempt, asked.next, asked.held) == (1, 2, True) and waits(told)
    assert not sent(told.tell(migrate("r", "d2")))  # of before
    actions = told.tell(migrate("r", "d1"))
    assert only(actions, HoldRequest) == [HoldRequest("d:r:1:p1:1", False)]
    told.step()
    assert told.holds() == [("r", "decode", 5)] and told.core.prefill.slots_used == 0


def test_what_was_voided_once_is_never_begun_again(told):
    stopped(told).tell(migrate("r", "d1"))
    (again,) = sent(told.tell(migrate("r")))
    assert isinstance(again, NotMigrated) and (again.next, again.held) == (2, False)
    assert not told.tell(migrate("r", "d1"))
    (made,) = sent(told.tell(migrate("r", "d3", 3)), "d3", Offer)
    assert made.attempt == 3


def test_a_newer_migrate_replaces_the_one_under_way(told):
    actions = stopped(told).tell(migrate("r", "d3", 3))
    assert only(actions, HoldRequest) == [HoldRequest("d:r:1:p1:1", False)]
    assert [(made.attempt, made.offer) for made in sent(actions, kind=Drop)] == [(2, 1)]
    assert [(made.attempt, made.offer) for made in sent(actions, "d3", Offer)] == [(3, 2)]
    assert not sent(told.tell(migrate("r"), migrate("r", "d3", 3)), kind=Offer), "late, and twice"


@pytest.mark.parametrize("how", [{"r": "stop"}, {"preempted": ["r"]}])
def test_one_that_cannot_go_on_is_withdrawn(told, how):
    told.tell(migrate("r"))
    told.step(**how)
    assert [made.attempt for made in sent(told.later(), "d2", Drop)] == [2]
    assert not told.tell(answers(landed, 0))


def test_one_that_does_not_run_is_not_offered(told):
    told.land("s", number=5)
    (found,) = sent(told.tell(migrate("s")))
    assert isinstance(found, NotMigrated) and found.why == "it does not run"
    (found,) = sent(told.tell(migrate("r", "d7")))
    assert found.why == "d1 has no connection to d7"
    assert not told.tell(migrate("nobody"))


def test_it_stops_in_time_when_its_blocks_do_not_leave(told):
    """After `ahead` tokens the destination could not take more; without an answer it goes on here."""
    short = working("d1", "p1", "d2", **LARGE).running("r", max_tokens=5)
    (made,) = sent(short.tell(migrate("r")), "d2", Offer)
    assert made.ahead == 2
    short.step()
    actions = short.step() + short.later()
    assert [found.why for found in sent(actions, kind=NotMigrated)] == ["d2 has not answered in time"]
    assert sent(actions, "d2", Drop)


def test_what_nobody_answers_is_sent_again(told):
    told.tell(migrate("r"))
    assert [made.offer for made in sent(told.later(1.0), "d2", Offer)] == [1]
    told.step()
    stopped(told)
    assert [(made.index, len(made.written)) for made in sent(told.later(1.1), "d2", Chunk)] == [(0, 0), (1, 5)]
    told.tell(answers(landed, 1))
    assert [made.index for made in sent(told.later(1.1), "d2", Chunk)] == [0, 1], "does it still have them?"


# ---------------------------------------------------------------- the destination


def running_offer(**changes):
    fields = {
        "src": "d2",
        "attempt": 2,
        "written": [5, 6],
        "ahead": 8,
        "receipt": BEFORE,
        "blocks": 5,
        "decoded_s": 2.0,
    }
    return offer("r", 8, max_tokens=40, **{**fields, **changes})


def last(stop=3, written=(5, 6, 7, 8), **changes):
    return chunk("r", 1, 2, stop, src="d2", attempt=2, written=[*written], **changes)


@pytest.fixture
def arriving():
    """Its first two blocks have landed, of 10 tokens known and room for 8 more."""
    made = working("d1", "p1", "d2", **LARGE)
    actions = made.tell(running_offer())
    assert kinds(actions) == ["AddRequest", "Grant > d2"] and made.requests["d:r:2:d2:1"].ahead == 8
    assert made.load().free_blocks == 35
    made.step()
    made.tell(chunk("r", 0, 0, 2, src="d2", attempt=2))
    return made


def test_it_lands_runs_at_once_and_has_all_tokens(arriving):
    actions = arriving.tell(last())
    assert [type(made) for made in sent(actions, "d2")] == [Landed]
    assert [made.stage.value for made in sent(actions, BROKER, Staged)] == ["waiting"]
    actions = arriving.later()
    assert only(actions, AdmitRequest) == [AdmitRequest("d:r:2:d2:1", 7, (8,))]
    (reported,) = sent(arriving.step(), BROKER, Tokens)
    assert [(item.attempt, item.start, item.ids) for item in reported.items] == [(2, 4, [TOKEN])]
    assert arriving.holds() == [("r", "decode", 5)]


def test_its_receipt_counts_both_ways():
    made = working("d1", "p1", "d2", **LARGE)
    made.tell(running_offer())
    made.step()
    made.tell(chunk("r", 0, 0, 2, src="d2", attempt=2), last())
    (reported,) = sent(made.step(r="stop"), BROKER, Tokens)
    receipt = reported.items[0].end.receipt
    assert (receipt.adopted, receipt.recomputed, receipt.local, receipt.migrated) == (8, 0, 0, 1)
    assert (receipt.prefill_instance, receipt.decode_instance) == ("p1", "d1")
    assert (receipt.kv_bytes, receipt.chunks) == (64 + 3 * 32, 3)


@pytest.mark.parametrize(
    "made",
    [
        last(written=(5, 6)),
        last(written=range(3, 15), stop=5),
        last(stop=4),
        chunk("r", 1, 2, 5, src="d2", attempt=2),
        chunk("r", 1, 2, 3, token=5, src="d2", attempt=2),
    ],
    ids=["too few tokens", "too many", "another end", "no tokens", "as of a prompt"],
)
def test_a_last_chunk_that_does_not_fit_is_refused(arriving, made):
    assert [type(answer) for answer in sent(arriving.tell(made), "d2")] == [Refuse]
    assert arriving.load().free_blocks == 40


def test_others_wait_while_it_enters_the_batch(arriving):
    """Whatever the policy says: it ran until now."""
    arriving.land("a", "b", "c", "d", number=7, src="p1")
    arriving.tell(last())
    first, *_ = only(arriving.later(), AdmitRequest)
    assert first.key == "d:r:2:d2:1"


def test_it_goes_on_to_a_third_one(arriving):
    arriving.tell(last())
    arriving.step()
    arriving.meet("d3")
    (made,) = sent(arriving.tell(migrate("r", "d3", 3, attempt=2)), "d3", Offer)
    assert made.written == [5, 6, 7, 8] and made.receipt.migrated == 1 and made.attempt == 3
    assert made.decoded_s == pytest.approx(2.0, abs=0.5)


def test_a_drop_takes_it_back_unless_all_has_landed(arriving):
    arriving.tell(drop("r", src="d2", attempt=2))
    assert arriving.load().free_blocks == 40
    arriving.tell(running_offer(offer=2))
    arriving.step()
    arriving.tell(
        chunk("r", 0, 0, 2, src="d2", attempt=2, offer=2), last(offer=2), drop("r", src="d2", attempt=2, offer=2)
    )
    assert arriving.holds() == [("r", "waiting", 4)]
