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
from tetri.wire.messages import Assign, Close, Hold, Membership

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
        (DECODING, replace(tokens("d1", RID, 1, 8), incarnation=2), [], "decode"),  # of no registered process
        # Another instance has all KV too, since a Landed was lost. It stops, and what it wrote does not count.
        (WAITING, staged("d2", RID, Stage.WAITING), [("d2", close(RID))], "waiting"),
        (WAITING, staged("d2", RID, Stage.DECODE), [("d2", close(RID))], "waiting"),
        (WAITING, heartbeat("d2", held(Stage.DECODE, 3)), [("d2", close(RID))], "waiting"),
        (DECODING, tokens("d2", RID, 1, 8), [("d2", close(RID))], "decode"),
        (DECODING, tokens("d2", RID, 3, 8), [("d2", close(RID))], "decode"),
        (DECODING, tokens("d2", RID, 1, 8, 9, 10, reason="length"), [("d2", close(RID))], "decode"),
        (DECODING, heartbeat("d2", held(Stage.DONE, 4)), [("d2", close(RID))], "decode"),
        # So does the prefill instance, which writes a first token only, and no end once another one decodes.
        (DECODING, tokens("p1", RID, 1, 8), [("p1", close(RID))], "decode"),
        (DECODING, tokens("p1", RID, 0, 7, reason="stop"), [("p1", close(RID))], "decode"),
        (DECODING, heartbeat("p1", held(Stage.DONE, 1), read=1), [("p1", close(RID))], "decode"),
        (SUBMITTED, heartbeat("p1"), [], "queued"),  # it may be on its way
        (
            SUBMITTED,
            heartbeat("p1", held(Stage.QUEUED, 0), Hold("x", 3, "decode", 5)),
            [("p1", close("x", 3))],
            "queued",
        ),
        (MOVED, heartbeat("d1", held(Stage.WAITING)), [("p1", close(RID))], "waiting"),  # the news of it were lost
        (WAITING, heartbeat("p1", held(Stage.MOVING)), [], "waiting"),  # the Close is on its way
        (WAITING, heartbeat("p1", held(Stage.MOVING), read=1), [("p1", close(RID))], "waiting"),  # it was lost
        (DECODING, heartbeat("d2", held(Stage.MOVING, 0)), [("d2", close(RID))], "decode"),  # a reservation elsewhere
        (DECODING, heartbeat("d1", held(Stage.DECODE, 3)), [("d1", resend(RID, 1))], "decode"),  # tokens were lost
        (DECODING, heartbeat("d1", held(Stage.DONE, 1)), [("d1", resend(RID, 1))], "decode"),  # the end was
        ([*DECODING, cancel()], heartbeat("d1", held(Stage.DONE, 4)), [], None),
        ([*DECODING, cancel()], heartbeat("d1", held(Stage.DONE, 4), read=1), [("d1", close(RID))], None),
    ],
)
def test_what_workers_say_and_hold_moves_it_on_and_both_sides_agree(before, event, said, stage):
    told = begin(before)
    assert told.tell(event) == [Send(peer, message) for peer, message in said]
    assert list(told.status().requests) == ([] if stage is None else [stage])


@pytest.mark.parametrize(
    "before, event, ids, closed",
    [
        (SUBMITTED, tokens("p1", RID, 0, 7), [7], []),
        ([staged("d1", RID, Stage.WAITING)], tokens("p1", RID, 0, 7), [7], []),  # it comes late
        (MOVED, tokens("d1", RID, 1, 8), [8], ["p1"]),  # d1 has all KV, and its Staged was lost
        (SUBMITTED, tokens("d1", RID, 0, 7, 8), [7, 8], ["p1"]),
        (SUBMITTED, tokens("d1", RID, 0, 7), [7], ["p1"]),
        (MOVED, tokens("p1", RID, 1, 8), [8], []),  # it does both phases
        (MOVED, tokens("d1", RID, 1, 8, 9, 10, reason="length"), [8, 9, 10], ["p1", "p1", "d1"]),
        (MOVED, tokens("d1", RID, 1, reason="stop"), [], ["p1", "p1", "d1"]),
        (SUBMITTED, tokens("p1", RID, 0, 7, reason="stop"), [7], ["p1"]),
    ],
)
def test_tokens_count_of_the_first_that_decodes_and_the_first_one_of_the_prefill_instance(before, event, ids, closed):
    actions = begin(before).tell(event)
    assert [id for reply in replies(actions) if isinstance(reply, Delta) for id in reply.ids] == ids
    assert [peer for peer, _ in closes(actions)] == closed


def test_the_prefill_instance_of_a_later_attempt_writes_its_first_token(decoding):
    decoding.tell(tokens("d1", RID, 1, 8), PeerDown("d1"))
    assert replies(decoding.tell(tokens("p1", RID, 2, 9, attempt=2)))[0].ids == [9]
    assert decoding.status().requests == {"moving": 1}
    assert replies(decoding.tell(tokens("d2", RID, 3, 10, attempt=2)))[0].ids == [10]
    assert decoding.status().counters.get("decodes_refused", 0) == 0


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


def serials(actions):
    """Of the Memberships among them."""
    return {message.serial for message in sent(actions, kind=Membership)}


def test_an_assign_is_sent_again_when_a_later_membership_was_read_and_it_was_not(served):
    """However long it takes the worker to read: until then, the Assign is on its way."""
    (before,) = serials(served.later(1.0))
    served.tell(submit("late"))
    for _ in range(9):
        served.now += 10.0
        assert assigned(served.tell(heartbeat("p1", held(Stage.QUEUED, 0), read=before))) == []
        assert served.tell(heartbeat("p2", read=before)) == []
    (after,) = serials(served.later())
    assert served.tell(heartbeat("p2", Hold("r2", 1, Stage.QUEUED, 0), read=after)) == []
    assert served.tell(heartbeat("p2", epoch=41, read=after)) == []  # an earlier broker's Membership
    assert assigned(served.tell(heartbeat("p2", read=after))) == [("p2", "r2", 1)]
    assert served.tell(heartbeat("p2", read=after)) == []  # now this one is on its way
    (later,) = serials(served.later(1.0))
    assert assigned(served.tell(heartbeat("p2", read=later))) == [("p2", "r2", 1)]


def test_a_heartbeat_without_a_list_of_requests_tells_nothing_of_them(decoding):
    decoding.later(1.0)
    assert decoding.tell(heartbeat("d1", held(Stage.DECODE, 1))) == []
    assert decoding.tell(heartbeat("d1").changed(holds=None, read=1)) == []
    assert {each.iid: each.held for each in decoding.status().instances}["d1"] == 1
    assert assigned(decoding.tell(heartbeat("d1", read=1))) == [("p1", RID, 2)]


def test_thousands_of_assigns_that_a_worker_reads_bit_by_bit_are_sent_once_each():
    told, read, unread, holds = serving("p1", "d1"), 0, [], {}
    actions, sends = [*told.later(1.0), *told.tell(*[submit(f"k{number}") for number in range(1000)])], 0
    for _ in range(40):  # steps, of 0.5 s
        unread += sent(actions, "p1")
        for message in unread[:64]:
            if isinstance(message, Membership):
                read = message.serial
            else:
                sends += isinstance(message, Assign)
                holds[message.rid] = Hold(message.rid, 1, Stage.QUEUED, 0)
        del unread[:64]
        actions = [*told.later(0.5), *told.tell(heartbeat("p1", *holds.values(), read=read))]
    assert sends == len(holds) == 1000


def test_what_has_a_token_of_its_attempt_and_is_not_held_starts_over():
    """A second prefill could write another first token, and a decode instance may go on from the one of the first."""
    told = begin(MOVED)
    actions = told.tell(heartbeat("p1"))
    assert closes(actions) == [("p1", close(RID))] and assigned(actions) == [("p1", RID, 2)]
    (again,) = sent(actions, kind=Assign)
    assert again.output == [7]
    assert closes(told.tell(heartbeat("d1", held(Stage.DECODE, 3)))) == [("d1", close(RID))]  # of the first attempt


@pytest.mark.parametrize("avoid, goes", [(["p1", "d1"], "p2"), (["d1"], "p1"), (["p1", "p2"], "p1")])
def test_the_next_attempt_avoids_the_instances_whose_kv_could_not_be_moved(avoid, goes):
    """If others are there; and so does every further one."""
    told = begin(MOVED)
    (assign,) = sent(told.tell(failed("p1", RID, retry=True, avoid=avoid)), goes, Assign)
    assert assign.avoid == avoid
    (assign,) = sent(told.tell(failed(goes, RID, retry=True, attempt=2, avoid=["d1", "d2"])), kind=Assign)
    assert assign.avoid == [*dict.fromkeys([*avoid, "d1", "d2"])]


def test_a_retry_goes_to_another_prefill_instance_than_the_one_that_gave_it_up():
    """Whatever their load: there it might only be given up again."""
    told = begin([])
    for attempt, (gave_up, goes) in enumerate([("p1", "p2"), ("p2", "p1")], 1):
        actions = told.tell(failed(gave_up, RID, retry=True, attempt=attempt))
        assert assigned(actions) == [(goes, RID, attempt + 1)]


class Unreadable:
    """p1, whose KV no decode instance could read, and p2. Requests are named by their number."""

    def __init__(self):
        self.told, self.number = serving("p1", "p2", "d1"), 0
        assert self.submit() == "p1"
        self.fail(1, "p2")

    def submit(self):
        """Where the next request goes."""
        self.number += 1
        ((iid, _, _),) = assigned(self.told.tell(submit(str(self.number))))
        return iid

    def fail(self, number, goes):
        gone = self.told.tell(failed("p1", f"r{number}", retry=True, avoid=["d1", "p1"]))
        assert [iid for iid, _, _ in assigned(gone)] == [goes]

    def notes(self):
        return [note for note in self.told.status().notes if note.startswith("p1")]


def test_a_prefill_instance_whose_kv_cannot_be_read_gets_a_request_now_and_then():
    seen = Unreadable()
    assert seen.notes() == ["p1 gets few requests, since its KV cannot be read: oh no"]
    assert [seen.submit() for _ in range(3)] == ["p2"] * 3
    seen.told.now = 0.4
    assert [seen.submit() for _ in range(3)] == ["p1", "p2", "p2"]
    seen.fail(5, "p2")
    seen.told.now = 0.79
    assert seen.submit() == "p2"
    seen.told.now = 1.2
    assert seen.submit() == "p1"
    seen.told.tell(staged("d1", "r9", Stage.WAITING))
    assert seen.notes() == [] and seen.submit() == "p1"


@pytest.mark.parametrize("end", ["cancelled", "lost"])
def test_a_try_that_shows_nothing_is_followed_by_another(end):
    seen = Unreadable()
    seen.told.now = 0.4
    assert seen.submit() == "p1" and seen.submit() == "p2"
    seen.told.tell(*([cancel("r2")] if end == "cancelled" else [PeerDown("p1"), PeerUp("p1"), heartbeat("p1")]))
    assert seen.submit() == "p1" and seen.notes() == ([] if end == "lost" else seen.notes())


def test_if_it_is_alone_it_gets_all():
    seen = Unreadable()
    seen.told.tell(PeerDown("p2"))
    assert [seen.submit() for _ in range(3)] == ["p1"] * 3


def test_nothing_starts_over_while_the_last_words_are_asked_for(decoding):
    decoding.edge = False
    decoding.tell(cancel())
    assert not assigned(decoding.tell(PeerDown("d1"), heartbeat("d2")))


def test_late_words_of_a_lost_worker_do_not_give_it_the_request():
    told = begin([*MOVED, PeerDown("d1")])
    late = [staged("d1", RID, Stage.WAITING), heartbeat("d1", held(Stage.DECODE)), tokens("d1", RID, 1, 8)]
    assert not told.tell(*late) and told.status().requests == {"moving": 1}
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
