"""What clients were sent and have confirmed: text in order, full queues, clients that leave and come back."""

import pytest

from tests.core.broker.serving import (
    ANOTHERS,
    RID,
    attach,
    cancel,
    done,
    end,
    refusal,
    replies,
    serving,
    submit,
)
from tests.core.build import ending, staged, tokens
from tests.core.reading import kinds, sent
from tetri.core.actions import Detokenized, Undelivered
from tetri.request import Stage
from tetri.wire.clients import Accepted, Delta, Done, Refused
from tetri.wire.messages import Close

FIRST = Delta(rid=RID, start=0, ids=[7], text="h")
THIRD = Delta(rid=RID, start=2, ids=[9], text="j")


@pytest.fixture
def told():
    """RID has its first token and decodes on d1."""
    made = serving("p1", "p2", "d1", "d2")
    made.tell(submit(), tokens("p1", RID, 0, 7), staged("d1", RID, Stage.WAITING), staged("d1", RID, Stage.DECODE))
    return made


def away(told, message, gone=True):
    return told.tell(Undelivered(b"c", message, gone))


@pytest.fixture
def second(told):
    """The second token, as its client was sent it."""
    (delta,) = replies(told.tell(tokens("d1", RID, 1, 8)))
    return delta


def known(told):
    return isinstance(replies(told.tell(attach(0)))[0], Delta)


def test_the_same_key_again_is_the_same_request_and_attaching_sends_what_is_missing(told):
    actions = told.tell(submit(client=b"again"))
    assert replies(actions, b"again") == [Accepted(key="k", rid=RID, prompt_tokens=3, max_tokens=4), FIRST]
    assert not sent(actions)
    assert told.status().requests == {"decode": 1} and replies(told.tell(attach(0))) == [FIRST]
    assert replies(told.tell(attach(1))) == [Delta(rid=RID, start=1, ids=[], text="")]  # a sign of life


@pytest.mark.parametrize(
    "wrong",
    [{"prompt": (1, 2, 4)}, {"max_tokens": 5}, {"deadline_s": 1.0}, {"seed": 3}, {"secret": ANOTHERS}],
    ids=lambda wrong: next(iter(wrong)),
)
@pytest.mark.parametrize("client", [b"c", b"other"])
def test_the_same_key_for_anything_else_is_refused_and_changes_nothing(told, wrong, client):
    actions = told.tell(submit(client=client, **wrong))
    why = "this key stands for another request: draw a new key for each request"
    assert replies(actions, client) == [Refused(key="k", reason=why)] and len(actions) == 1
    assert replies(told.tell(tokens("d1", RID, 1, 8))) == [Delta(rid=RID, start=1, ids=[8], text="i")]
    assert told.status().counters["refused"] == 1 and told.status().requests == {"decode": 1}


def test_a_key_is_kept_for_its_request_as_long_as_that_is_known(told):
    told.tell(cancel())
    assert "another request" in refusal(told.tell(submit(prompt=(9,))))
    told.later(2.1)  # what was refused does not make it last longer
    assert isinstance(replies(told.tell(submit(prompt=(9,))))[0], Accepted)


@pytest.mark.parametrize("ask", [attach, cancel])
@pytest.mark.parametrize("wrong", ["", ANOTHERS])
def test_who_has_not_made_the_secret_is_told_nothing_and_changes_nothing(told, ask, wrong):
    def answer(rid):
        start = (0,) if ask is attach else ()
        return told.tell(ask(*start, rid=rid, client=b"other", secret=wrong))

    assert replies(answer(RID), b"other") == [Refused(key=RID, reason=f"no request {RID} is known here")]
    assert replies(answer("r7"), b"other") == [Refused(key="r7", reason="no request r7 is known here")]
    assert replies(told.tell(tokens("d1", RID, 1, 8))) == [Delta(rid=RID, start=1, ids=[8], text="i")]


def test_a_client_that_does_not_know_the_id_yet_cancels_by_the_key(told):
    assert refusal(told.tell(cancel("k", secret=ANOTHERS))) == "no request k is known here"
    assert done(told.tell(cancel("k"))).reason == "cancelled" and told.status().requests == {}
    assert refusal(told.tell(cancel("k2"))) == "no request k2 is known here"


def test_an_operator_ends_a_request_without_its_secret(told):
    actions = told.tell(end())
    assert done(actions) == done(actions, b"operator") and done(actions).reason == "cancelled"
    assert replies(told.tell(end()), b"operator") == [done(actions)]
    assert replies(told.tell(end("r7")), b"operator")[0].reason == "no request r7 is known here"


def test_a_stop_text_ends_the_request_and_tokens_past_it_do_not_count(told):
    told.stops[RID] = 2
    actions = told.tell(tokens("d1", RID, 1, 8, 9))
    assert kinds(actions) == ["Detokenize", "Reply", "Close > p1", "Close > d1", "Reply", "Release"]
    assert replies(actions)[0] == Delta(rid=RID, start=1, ids=[8], text="ij")
    assert (done(actions).reason, done(actions).usage.completion_tokens) == ("stop", 2)


def test_an_answer_that_a_stop_text_ended_has_no_error(told):
    told.stops[RID] = 2
    told.edge = False
    (last,) = ending("d1", RID, 1, 8, reason="error")
    told.tell(last)
    ended = done(told.tell(Detokenized(RID, 1, (8,), "i", 2, True)))
    assert (ended.reason, ended.error) == ("stop", None)


def test_the_detokenizer_hears_what_ends_the_text_and_from_when_on():
    told = serving("p1", "d1")
    told.edge = False
    told.tell(submit(stop=["x"], min_tokens=3, stop_token_ids=[9]))
    (asked,) = told.tell(tokens("p1", RID, 0, 7))
    assert (asked.rid, asked.start, asked.ids, asked.final) == (RID, 0, (7,), False)
    assert (asked.sampling.stop, asked.sampling.min_tokens, asked.sampling.stop_token_ids) == (["x"], 3, [9])


def test_words_that_come_late_are_ignored(told):
    told.tell(cancel())
    assert not told.tell(Detokenized(RID, 1, (8,), "i", None, False), Detokenized("nobody", 0, (), "", None, True))


def test_while_the_last_words_are_asked_for_nothing_else_ends_it(told):
    told.edge = False
    told.tell(cancel())
    assert not told.tell(cancel(), *ending("d1", RID, 1, 8))
    assert done(told.tell(Detokenized(RID, 1, (), "", None, True))).reason == "cancelled"


def test_text_without_tokens_at_the_end_is_sent_again(told):
    told.edge = False
    told.tell(*ending("d1", RID, 1, 8, 9, 10))
    told.tell(Detokenized(RID, 1, (8, 9, 10), "ijk", None, False), Detokenized(RID, 4, (), "tail", None, True))
    again = replies(told.tell(attach(4)))
    assert again[0] == Delta(rid=RID, start=4, ids=[], text="tail") and isinstance(again[1], Done)


def test_a_full_client_is_tried_again_in_order(told, second):
    away(told, second, gone=False)
    assert not replies(told.tell(tokens("d1", RID, 2, 9)))
    assert replies(told.later(0.06)) == [second] and replies(told.later()) == [THIRD]


@pytest.mark.parametrize("back", [attach(1, client=b"new"), submit(client=b"new")])
def test_a_client_that_left_may_come_back_within_the_grace(told, second, back):
    away(told, second)
    assert not replies(told.tell(tokens("d1", RID, 2, 9)))
    told.now += 1.9
    assert replies(told.tell(back), b"new")[-2:] == [second, THIRD]
    told.later(3.0)
    assert told.status().requests == {"decode": 1}


def test_a_client_that_stays_away_cancels_its_request(told, second):
    away(told, second)
    actions = told.later(2.1)
    assert {close.reason for close in sent(actions, kind=Close)} == {"cancelled"} and not replies(actions)
    assert told.status().counters["ended_cancelled"] == 1


def test_what_is_undelivered_to_others_or_is_no_letter_changes_nothing(told):
    told.tell(Undelivered(b"other", FIRST, gone=True))
    away(told, Accepted(key="k", rid=RID, prompt_tokens=3, max_tokens=4), gone=False)
    away(told, Refused(key="k", reason="no"), gone=False)
    assert replies(told.tell(tokens("d1", RID, 1, 8))) == [Delta(rid=RID, start=1, ids=[8], text="i")]


def test_an_ended_request_is_forgotten_after_the_grace(told):
    end = done(told.tell(cancel()))
    away(told, end, gone=False)
    assert replies(told.later(2.1)) == [end]
    told.later(1.0)
    assert not known(told) and replies(told.tell(submit()))[0].rid == "r2"


@pytest.mark.parametrize("ask", [attach(0), submit()])
def test_an_ended_request_is_kept_while_its_client_asks_but_not_for_ever(told, ask):
    told.tell(cancel())
    ended_at = told.now
    while isinstance(replies(told.tell(ask))[-1], Done):
        told.later(1.5)
        assert told.now < ended_at + 100.0
    assert 10.0 < told.now - ended_at <= 10.0 + 2.0 + 1.5  # the patience, and the grace of the last answer


@pytest.mark.parametrize("asks", [True, False])
def test_a_slow_reader_gets_its_end_after_the_grace_but_is_not_waited_for_for_ever(asks):
    told = serving("p1", "d1", limits={"retry_s": 1e6})
    told.tell(submit(), tokens("p1", RID, 0, 7), staged("d1", RID, Stage.DECODE))
    away(told, replies(told.tell(*ending("d1", RID, 1, 8, 9, 10)))[0], gone=False)
    told.later(2.1)
    assert not asks or isinstance(replies(told.tell(attach(1)) + told.later())[-1], Done)
    for _ in range(1 if asks else 6):
        told.later(2.1)
    assert not known(told)


def test_whoever_cancels_while_it_counts_as_gone_and_comes_back_gets_the_end_once(told, second):
    told.edge = False
    away(told, second)
    told.tell(cancel(), cancel(), attach(2))
    assert isinstance(done(told.tell(Detokenized(RID, 2, (), "", None, True))), Done)


def test_cancelling_once_more_or_by_another_client_is_answered_with_the_end(told):
    actions = told.tell(cancel(client=b"other"))
    assert kinds(actions) == ["Detokenize", "Close > p1", "Close > d1", "Reply", "Reply", "Release"]
    assert done(actions) == done(actions, b"other")
    assert replies(told.tell(cancel())) == [done(actions)] and not told.tell(tokens("d1", RID, 1, 8))
