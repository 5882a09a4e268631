"""The life of a request: placed, moved on, started over, ended; what its workers report, and what they are told."""

import pytest
from msgspec.structs import replace

from tests.core.broker.serving import RID, assigned, cancel, done, replies, serving, submit
from tests.core.build import capacity, close, ending, failed, heartbeat, ready, resend, staged, tokens
from tests.core.reading import kinds, only, sent
from tetri.core.actions import Reply, Send
from tetri.request import Receipt, Stage
from tetri.wire.clients import Delta
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.messages import Assign, Close, Hold

# What has come of a request when an event comes.
SUBMITTED = []
MOVED = [tokens("p1", RID, 0, 7)]
WAITING = [*MOVED, staged("d1", RID, Stage.WAITING)]
DECODING = [*WAITING, staged("d1", RID, Stage.DECODE)]


def held(stage, outputs=1):
    return Hold(RID, 1, stage, outputs)


def begin(before, *workers, **changes):
    told = serving(*workers or ("p1", "p2", "d1", "d2"), limits={"max_attempts": 3})
    told.tell(submit(**changes), *before)
    return told


@pytest.fixture
def served():
    return begin([])


@pytest.fixture
def decoding():
    return begin(DECODING)


def closes(actions):
    """To which instance what is said."""
    return [(action.peer, action.message) for action in only(actions, Send) if isinstance(action.message, Close)]


# ---------------------------------------------------------------- the way of a request


def test_one_request_from_queue_to_done():
    served = begin([], max_tokens=3)
    served.now = 1.0
    served.tell(staged("p1", RID, Stage.PREFILL))
    served.now = 3.0
    assert replies(served.tell(tokens("p1", RID, 0, 7))) == [Delta(rid=RID, start=0, ids=[7], text="h")]
    assert served.status().requests == {"moving": 1}
    served.tell(staged("p1", RID, Stage.MOVING))
    served.now = 4.0
    assert kinds(served.tell(staged("d1", RID, Stage.WAITING))) == ["Close > p1"]
    assert not served.tell(staged("d1", RID, Stage.DECODE))
    served.now = 6.0
    last = served.tell(*ending("d1", RID, 1, 8, 9))
    assert kinds(last) == ["Detokenize", "Reply", "Close > p1", "Close > d1", "Reply", "Release"]
    end = done(last)
    assert (end.reason, end.usage.completion_tokens, end.ttft_s, end.jct_s) == ("length", 3, 3.0, 6.0)
    assert end.timeline == {"queued": 1.0, "prefill": 2.0, "moving": 1.0, "waiting": 0.0, "decode": 2.0}
    assert end.receipt == Receipt(prompt_tokens=3, adopted=3, prefill_instance="p1", decode_instance="d1")
    assert not served.status().requests


@pytest.mark.parametrize(
    "before, event, said, stage",
    [
        (MOVED, staged("p1", RID, Stage.WAITING), [], "waiting"),  # it does both phases
        (MOVED, staged("p1", RID, Stage.PREFILL), [], "moving"),  # late: nothing leads back
        (DECODING, staged("d1", RID, Stage.DONE), [], "decode"),  # the broker alone ends it
        (DECODING, failed("p1", RID, retry=True), [], "decode"),  # it holds it no more
        (DECODING, tokens("d1", RID, 4, reason="length"), [("d1", resend(RID, 1))], "decode"),  # tokens are missing
        (DECODING, tokens("d1", RID, 0, 7), [], "decode"),  # known
        (SUBMITTED, heartbeat("p1"), [], "queued"),  # it may be on its way
        (
            SUBMITTED,
            heartbeat("p1", held(Stage.QUEUED, 0), Hold("x", 3, "decode", 5)),
            [("p1", close("x", 3))],
            "queued",
        ),
        (MOVED, heartbeat("d1", held(Stage.WAITING)), [("p1", close(RID))], "waiting"),  # the news of it were lost
        (WAITING, heartbeat("p1", held(Stage.MOVING)), [("p1", close(RID))], "waiting"),
        (DECODING, heartbeat("d2", held(Stage.MOVING, 0)), [("d2", close(RID))], "decode"),  # a reservation elsewhere
        (DECODING, heartbeat("d1", held(Stage.DECODE, 3)), [("d1", resend(RID, 1))], "decode"),  # tokens were lost
        (DECODING, heartbeat("d1", held(Stage.DONE, 1)), [("d1", resend(RID, 1))], "decode"),  # the end was
        ([*DECODING, cancel()], heartbeat("d1", held(Stage.DONE, 4)), [("d1", close(RID))], None),
    ],
)
def test_what_workers_say_and_hold_moves_it_on_and_both_sides_agree(before, event, said, stage):
    told = begin(before)
    assert told.tell(event) == [Send(peer, message) for peer, message in said]
    assert list(told.status().requests) == ([] if stage is None else [stage])


def test_tokens_that_overlap_are_cut(decoding):
    assert replies(decoding.tell(tokens("d1", RID, 0, 7, 8, 9))) == [Delta(rid=RID, start=1, ids=[8, 9], text="ij")]
    assert replies(decoding.tell(tokens("d1", RID, 3, 10, 11)))[0] == Delta(rid=RID, start=3, ids=[10], text="k")


def test_older_attempts_are_ignored(decoding):
    decoding.tell(PeerDown("d1"))
    late = [tokens("p1", RID, 1, 8), *ending("p1", RID, 1, 8), failed("p1", RID, retry=True)]
    assert not decoding.tell(*late, staged("p2", RID, Stage.DECODE))
    assert replies(decoding.tell(tokens("p1", RID, 1, 9, attempt=2)))[0].ids == [9]


# ---------------------------------------------------------------- ends, and what workers learn from them


@pytest.mark.parametrize(
    ("sampling", "news", "reason", "outputs"),
    [
        ({}, ending("d1", RID, 1, 8, reason="stop"), "stop", 2),
        ({}, ending("d1", RID, 1, 8, 9, 10), "length", 4),
        ({"ignore_eos": True}, ending("d1", RID, 1, 8, 9, 10), "length", 0),
        ({}, [cancel()], "cancelled", 0),
        ({}, [failed("d1", RID, retry=False)], "error", 0),
    ],
)
def test_both_workers_hear_how_it_ended_and_what_can_be_learnt_from_that(sampling, news, reason, outputs):
    actions = begin(DECODING, **sampling).tell(*news)
    said = close(RID, 1, reason, outputs)
    assert closes(actions)[-2:] == [("p1", said), ("d1", said)] and done(actions).reason == reason
    assert done(actions).error == ("oh no" if reason == "error" else None)


def test_all_output_counts_whoever_wrote_it(decoding):
    decoding.tell(PeerDown("d1"), tokens("p1", RID, 1, 8, attempt=2), staged("d2", RID, Stage.DECODE, 2))
    said = close(RID, 2, "stop", 3)
    ended = decoding.tell(*ending("d2", RID, 2, 9, reason="stop", attempt=2))
    assert closes(ended) == [("p1", said), ("d2", said)] and done(ended).receipt.attempts == 2
    assert done(ended).receipt.continued == 1  # the token that the first attempt wrote


def test_an_attempt_that_starts_without_tokens_continues_nothing():
    told = begin(SUBMITTED)
    told.tell(PeerDown("p1"))
    ended = told.tell(*ending("p2", RID, 0, 7, reason="stop", attempt=2))
    assert (done(ended).receipt.attempts, done(ended).receipt.continued) == (2, 0)


def test_an_error_that_a_worker_ends_a_request_with_reaches_the_client(decoding):
    (last,) = ending("d1", RID, 1, 8, reason="error")
    item = last.items[0]
    item = replace(item, end=item.end.changed(error="no valid number"))
    ended = done(decoding.tell(last.changed(items=[item])))
    assert (ended.reason, ended.error, ended.usage.completion_tokens) == ("error", "no valid number", 2)
    assert ended.receipt.decode_instance == "d1"


def test_after_a_restart_it_goes_on(decoding):
    """Whoever has predicted it keeps that until the end."""
    again = decoding.tell(failed("d1", RID, retry=True))
    assert closes(again) == [("p1", close(RID)), ("d1", close(RID))]
    ((prefill, _, attempt),) = assigned(again)
    ended = decoding.tell(*ending(prefill, RID, 1, 8, reason="stop", attempt=attempt))
    assert closes(ended) == [(prefill, close(RID, 2, "stop", 2))]


def test_a_deadline_ends_it(decoding):
    decoding.tell(submit("b", deadline_s=2.0))
    assert not only(decoding.later(1.9), Reply)
    actions = decoding.later(0.2)
    assert done(actions).reason == "deadline" and {each.reason for _, each in closes(actions)} == {"deadline"}


def test_a_deadline_after_the_end_is_nothing(decoding):
    decoding.tell(submit("b", deadline_s=1.0), cancel("r2"))
    assert not only(decoding.later(1.5), Reply)


@pytest.mark.parametrize(
    "before, events, changes, reason",
    [
        (DECODING, [tokens("d1", RID, 1, 8, 9, 10)], {}, "length"),  # all that it may write: its end need not come
        (SUBMITTED, ending("p1", RID, 0, 7), {"max_tokens": 1}, "length"),
        # The end comes with the last tokens: their worker may be lost just then.
        (DECODING, [tokens("d1", RID, 1, 8, 9, reason="stop"), PeerDown("d1")], {}, "stop"),
        (SUBMITTED, [tokens("p1", RID, 0, 7, reason="length"), heartbeat("p1")], {"max_tokens": 1}, "length"),
        ([staged("p1", RID, Stage.PREFILL)], [cancel()], {}, "cancelled"),
        (MOVED, [cancel()], {}, "cancelled"),
    ],
)
def test_it_ends_once_for_its_reason_and_whoever_has_it_hears(before, events, changes, reason):
    told = begin(before, **changes)
    actions = told.tell(*events)
    assert done(actions).reason == reason and not told.status().requests
    assert {message.reason for _, message in closes(actions)} == {reason} and not assigned(actions)
    assert done(actions).receipt.prefill_instance == "p1"


# ---------------------------------------------------------------- without a prefill instance


def test_patience_without_a_prefill_instance_is_not_prolonged_by_others():
    told = serving()
    told.tell(submit())
    told.now = 9.0
    told.tell(ready("d1", "decode"), PeerUp("d1"))
    end = done(told.later(1.1))
    assert (end.reason, end.error) == ("error", "no prefill instance for 10 s")


def test_a_waiting_request_goes_to_the_first_that_comes():
    told = serving()
    assert not assigned(told.tell(submit(), ready("p1", "prefill")))  # no connection yet
    assert assigned(told.tell(PeerUp("p1"))) == [("p1", RID, 1)]
    for _ in range(4):
        assert not replies(told.later(4.0) + told.tell(heartbeat("p1", Hold(RID, 1, Stage.QUEUED, 0))))


@pytest.mark.parametrize("larger", [None, "lost"])
def test_what_no_prefill_instance_could_begin_anew_fails_at_once(larger):
    """Ten tokens with its output: those that prefill hold eight. One that is lost may come back, and held more."""
    told = serving(("p1", {"capacity": capacity(blocks=2)}), "d1", *["p2"] * (larger == "lost"))
    told.tell(PeerDown("p2"))
    told.tell(submit(prompt=range(1, 7), max_tokens=20), *DECODING, tokens("d1", RID, 1, 8, 9, 10))
    actions = told.tell(PeerDown("d1"))
    if larger == "lost":
        assert not replies(actions) and done(told.later(10.1)).error == "no prefill instance for 10 s"
    else:
        assert "10 tokens, its output so far included, fit into no prefill instance" in done(actions).error


# ---------------------------------------------------------------- another attempt


@pytest.mark.parametrize(
    "before, event, goes, output",
    [
        (SUBMITTED, PeerDown("p1"), "p2", []),
        ([staged("p1", RID, Stage.PREFILL)], PeerDown("p1"), "p2", []),
        ([staged("p1", RID, Stage.MOVING)], PeerDown("p1"), "p2", []),
        (WAITING, PeerDown("d1"), "p1", [7]),
        (DECODING, PeerDown("d1"), "p1", [7]),
        (DECODING, heartbeat("d1"), "p1", [7]),  # it does not hold it any more
        (DECODING, failed("d1", RID, retry=True), "p1", [7]),
        (DECODING, PeerDown("p1"), None, []),  # which had let go
    ],
)
def test_what_is_lost_begins_anew_with_its_output(before, event, goes, output):
    told = begin(before)
    actions = told.tell(event)
    assert assigned(actions) == ([] if goes is None else [(goes, RID, 2)])
    for assign in sent(actions, kind=Assign):
        assert (assign.prompt, assign.output) == ([1, 2, 3], output) and told.status().requests == {"queued": 1}
        assert {message for _, message in closes(actions)} == {close(RID)}


def test_what_was_assigned_and_is_not_held_is_assigned_again(served):
    served.now = 0.3
    assert assigned(served.tell(heartbeat("p1"))) == [("p1", RID, 1)]
    assert not served.tell(heartbeat("p1"))


def test_nothing_starts_over_while_the_last_words_are_asked_for(decoding):
    decoding.edge = False
    decoding.tell(cancel())
    assert not assigned(decoding.tell(PeerDown("d1"), heartbeat("d2")))


def test_late_words_of_a_lost_worker_do_not_give_it_the_request():
    told = begin([*MOVED, PeerDown("d1")])
    told.tell(staged("d1", RID, Stage.WAITING), heartbeat("d1", held(Stage.DECODE)))
    assert told.status().requests == {"moving": 1}
    told.tell(PeerUp("d1"), heartbeat("d1", held(Stage.DECODE)))
    assert told.status().requests == {"decode": 1}


# ---------------------------------------------------------------- which lost attempts count


def test_attempts_that_are_lost_with_their_workers_do_not_count_but_not_without_bound():
    told = begin(SUBMITTED, "p1", "d1")
    for attempt in range(2, 4 * 3 + 1):
        again = told.tell(PeerDown("p1"), ready("p1", "prefill", incarnation=attempt), PeerUp("p1"))
        assert assigned(again) == [("p1", RID, attempt)]
    error = "given up after 12 attempts (12 lost with their workers): p1: connection lost"
    assert done(told.tell(PeerDown("p1"))).error == error


def test_other_attempts_count():
    told = begin(SUBMITTED, "p1", "d1")
    told.tell(PeerDown("p1"), ready("p1", "prefill", incarnation=2), PeerUp("p1"))
    for attempt in (2, 3):
        told.tell(failed("p1", RID, retry=True, attempt=attempt).changed(incarnation=2))
    ended = done(told.tell(failed("p1", RID, retry=True, attempt=4).changed(incarnation=2)))
    assert ended.error == "given up after 4 attempts (1 lost with their workers): oh no"
