"""The broker's core: placing, relaying, starting over, reconciling."""

import time
from random import Random

import pytest
from msgspec import structs

from tests.core.build import (
    FINGERPRINT,
    WordingTold,
    capacity,
    failed,
    fingerprint,
    heartbeat,
    kinds,
    only,
    ready,
    sent,
    staged,
    tokens,
)
from tetri.core.actions import (
    Broken,
    Detokenize,
    Detokenized,
    Disconnect,
    FromClient,
    Release,
    Reply,
    Send,
    Submitted,
    Undelivered,
)
from tetri.core.broker.broker import Broker
from tetri.core.broker.delivery import Limits
from tetri.cost import Cost
from tetri.policy.rules import Rules
from tetri.request import Receipt, Sampling, Stage
from tetri.wire.clients import Accepted, Attach, Cancel, Delta, Done, Inspect, MonitorStatus, Refused
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.messages import Assign, Close, ClusterView, FromWorker, Hold, Membership, Resend

RID = "00002a-1"  # of the first request
LIMITS = Limits(
    context=40,
    vocabulary=100,
    max_open=3,
    max_attempts=3,
    heartbeat_s=0.1,
    dead_s=5.0,
    patience_s=10.0,
    client_grace_s=2.0,
    retry_s=0.05,
)


def submit(key="k", prompt=(1, 2, 3), client=b"c", deadline_s=None, **sampling):
    return Submitted(client, key, tuple(prompt), Sampling(**{"max_tokens": 4, **sampling}), deadline_s)


def cancel(rid=RID, client=b"c"):
    return FromClient(client, Cancel(rid=rid))


def attach(start, rid=RID, client=b"c"):
    return FromClient(client, Attach(rid=rid, start=start))


def replies(actions, client=b"c"):
    return [action.message for action in only(actions, Reply) if action.client == client]


def done(actions, client=b"c"):
    (found,) = [reply for reply in replies(actions, client) if isinstance(reply, Done)]
    return found


@pytest.fixture
def broker():
    told = WordingTold(Broker(LIMITS, Rules(), epoch=42, rng=Random(1), now=0.0, model="m"))
    yield told
    told.core.check()


@pytest.fixture
def served(broker):
    """With workers p1, p2 and d1, d2."""
    for iid, role in (("p1", "prefill"), ("p2", "prefill"), ("d1", "decode"), ("d2", "decode")):
        broker.tell(ready(iid, role), PeerUp(iid))
    return broker


@pytest.fixture
def decoding(served):
    """RID has its first token and decodes on d1."""
    served.tell(submit(), staged("p1", RID, Stage.PREFILL), tokens("p1", RID, 0, 7))
    served.tell(staged("d1", RID, Stage.WAITING), staged("d1", RID, Stage.DECODE))
    return served


def row(told):
    return told.core.table.rows[RID]


# ---------------------------------------------------------------- submitting


def test_a_request_is_accepted_and_assigned_to_the_least_loaded(served):
    first = served.tell(submit("a"))
    assert replies(first) == [Accepted(key="a", rid=RID, prompt_tokens=3)]
    (assign,) = sent(first, "p1", Assign)
    assert (assign.rid, assign.attempt, assign.prompt, assign.output) == (RID, 1, [1, 2, 3], [])
    assert sent(served.tell(submit("b")), "p2", Assign)


@pytest.mark.parametrize(
    "wrong, reason",
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"prompt": ()}, "the prompt is empty"),
        ({"prompt": (1, 100)}, "vocabulary of 100"),
        ({"prompt": (-1,)}, "vocabulary of 100"),
        ({"prompt": (1,) * 40}, "the model's context holds 40"),
        ({"prompt": (1,) * 30, "max_tokens": 11}, "room for 10"),
        ({"deadline_s": 0.0}, "deadline_s must be above 0"),
        ({"deadline_s": float("nan")}, "deadline_s must be above 0"),
    ],
)
def test_what_can_never_be_served_is_refused_with_the_reason(served, wrong, reason):
    actions = served.tell(submit(**wrong))
    (refused,) = replies(actions)
    assert isinstance(refused, Refused) and reason in refused.reason and refused.retry_after_s is None
    assert kinds(actions) == ["Reply"] and served.core.counters["refused"] == 1


def test_what_fits_into_no_instance_is_refused(broker):
    broker.tell(ready("p1", "prefill", capacity=capacity(blocks=9)), ready("d1", "decode", capacity=capacity(blocks=2)))
    (refused,) = replies(broker.tell(submit(prompt=(1,) * 6, max_tokens=3)))
    assert "9 tokens fit into no decode instance: the largest holds 8" in refused.reason
    (refused,) = replies(broker.tell(submit(prompt=(1,) * 37, max_tokens=3)))
    assert "37 tokens fit into no prefill instance" in refused.reason
    assert isinstance(replies(broker.tell(submit(prompt=(1,) * 5, max_tokens=3)))[0], Accepted)


def test_the_same_key_again_is_the_same_request(decoding):
    actions = decoding.tell(submit(client=b"again"))
    assert replies(actions, b"again") == [
        Accepted(key="k", rid=RID, prompt_tokens=3),
        Delta(rid=RID, start=0, ids=[7], text="h"),
    ]
    assert decoding.core.table.open == 1 and not sent(actions)


def test_too_many_are_refused_until_later(served):
    served.tell(submit("a"), submit("b"), submit("c"))
    (refused,) = replies(served.tell(submit("d")))
    assert refused == Refused(key="d", reason="3 requests are open, try later", retry_after_s=1.0)


def test_drawn_tokens_get_a_seed_and_a_given_one_stays(served):
    served.tell(submit("a", temperature=1.0), submit("b", temperature=1.0, seed=5), submit("c"))
    seeds = [each.sampling.seed for each in served.core.table.rows.values()]
    assert seeds[0] is not None and seeds[1:] == [5, None]


# ---------------------------------------------------------------- least loaded, in predicted seconds


@pytest.fixture
def priced():
    """With p1 and p2: a chunk of four tokens takes a second, and as long again for every four before it."""
    cost = Cost(prefill=((1.0, 1.0), (4.0, 1.0)), prefill_start_s=1 / 16)
    told = WordingTold(Broker(LIMITS, Rules(), epoch=42, rng=Random(1), now=0.0, cost=cost, chunk_tokens=4))
    for iid, role in (("p1", "prefill"), ("p2", "prefill"), ("d1", "decode")):
        told.tell(ready(iid, role), PeerUp(iid))
    yield told
    told.core.check()


def place_of(told, key, tokens_):
    (send,) = [action for action in told.tell(submit(key, [1] * tokens_)) if isinstance(action, Send)]
    return send.peer


def test_one_long_prompt_weighs_more_than_as_many_tokens_in_short_ones(priced):
    assert place_of(priced, "a", 8) == "p1"  # 1 + 2 s
    assert [place_of(priced, key, 4) for key in "bc"] == ["p2", "p2"]  # 1 s each
    assert priced.core.table.work_ns == {"p1": 3 * 10**9, "p2": 2 * 10**9}


def test_what_is_computed_lost_or_over_is_no_work(priced):
    for key in "abc":
        place_of(priced, key, 4)
    assert priced.core.table.work_ns == {"p1": 2 * 10**9, "p2": 10**9}
    priced.tell(tokens("p1", "00002a-1", 0, 7))
    assert priced.core.table.work_ns == {"p1": 10**9, "p2": 10**9}
    priced.tell(cancel("00002a-3"))
    assert priced.core.table.work_ns == {"p2": 10**9}
    priced.tell(PeerDown("p2"))
    assert priced.core.table.work_ns == {"p1": 10**9}


def test_a_request_is_assigned_with_what_is_left_until_its_deadline(served):
    first = served.tell(submit(deadline_s=3.0))
    assert sent(first, "p1", Assign)[0].deadline_s == 3.0
    served.now = 1.0
    assert sent(served.tell(PeerDown("p1")), "p2", Assign)[0].deadline_s == 2.0


# ---------------------------------------------------------------- the way of a request


def test_one_request_from_queue_to_done(served):
    served.tell(submit(max_tokens=3))
    served.now = 1.0
    served.tell(staged("p1", RID, Stage.PREFILL))
    served.now = 3.0
    first = served.tell(tokens("p1", RID, 0, 7))
    assert replies(first) == [Delta(rid=RID, start=0, ids=[7], text="h")] and row(served).stage is Stage.MOVING
    served.tell(staged("p1", RID, Stage.MOVING))
    served.now = 4.0
    assert kinds(served.tell(staged("d1", RID, Stage.WAITING))) == ["Close > p1"]
    assert not served.tell(staged("d1", RID, Stage.DECODE))
    served.now = 6.0
    last = served.tell(tokens("d1", RID, 1, 8, 9, reason="length"))
    assert kinds(last) == ["Detokenize", "Reply", "Close > p1", "Close > d1", "Reply", "Release"]
    end = done(last)
    assert (end.reason, end.usage.completion_tokens, end.ttft_s, end.jct_s) == ("length", 3, 3.0, 6.0)
    assert end.timeline == {"queued": 1.0, "prefill": 2.0, "moving": 1.0, "waiting": 0.0, "decode": 2.0}
    assert (end.receipt.decode_instance, end.receipt.adopted, end.receipt.attempts) == ("d1", 3, 1)
    assert served.core.table.open == 0


def test_an_instance_that_did_both_phases_keeps_it(served):
    served.tell(submit(), tokens("p1", RID, 0, 7))
    assert not served.tell(staged("p1", RID, Stage.WAITING)) and row(served).decode == "p1"


def test_an_end_beyond_a_gap_waits_for_the_tokens_before_it(decoding):
    early = decoding.tell(tokens("d1", RID, 3, 10, reason="stop"))
    assert early == [Send("d1", Resend(rid=RID, attempt=1, start=1))]
    end = done(decoding.tell(tokens("d1", RID, 1, 8, 9, 10, reason="stop")))
    assert (end.reason, end.usage.completion_tokens, end.receipt.adopted) == ("stop", 4, 3)


def test_an_end_whose_tokens_are_all_here_ends_it(decoding):
    """A Heartbeat said that it has ended; the answer to the Resend has no token that is not known."""
    decoding.tell(tokens("d1", RID, 1, 8))
    assert decoding.tell(heartbeat("d1", Hold(RID, 1, Stage.DONE, 2))) == [
        Send("d1", Resend(rid=RID, attempt=1, start=2))
    ]
    end = done(decoding.tell(tokens("d1", RID, 2, reason="stop")))
    assert (end.reason, end.usage.completion_tokens, end.receipt.adopted) == ("stop", 2, 3)


def test_all_tokens_without_a_word_of_the_end_are_the_end_and_the_receipt_says_so(decoding):
    """No worker should; one that does must not hold the request up, nor have a receipt invented."""
    end = done(decoding.tell(tokens("d1", RID, 1, 8, 9, 10)))
    assert (end.reason, end.usage.completion_tokens) == ("length", 4)
    assert end.receipt == Receipt(prompt_tokens=3, prefill_instance="p1", decode_instance="d1")


def test_a_gap_is_asked_for_and_what_is_known_ignored(decoding):
    assert decoding.tell(tokens("d1", RID, 2, 9)) == [Send("d1", Resend(rid=RID, attempt=1, start=1))]
    assert not decoding.tell(tokens("d1", RID, 0, 7))
    assert replies(decoding.tell(tokens("d1", RID, 0, 7, 8, 9))) == [Delta(rid=RID, start=1, ids=[8, 9], text="ij")]
    assert decoding.core.counters["resends"] == 1


def test_more_tokens_than_asked_are_cut(decoding):
    actions = decoding.tell(tokens("d1", RID, 1, 8, 9, 10, 11, reason="length"))
    assert replies(actions)[0] == Delta(rid=RID, start=1, ids=[8, 9, 10], text="ijk")
    assert (done(actions).reason, done(actions).usage.completion_tokens) == ("length", 4)


def test_a_first_token_without_news_of_its_stage_moves_the_row_on(served):
    served.tell(submit(), tokens("p1", RID, 0, 7), staged("p1", RID, Stage.PREFILL))
    assert row(served).stage is Stage.MOVING


def test_older_attempts_and_unknown_requests_are_ignored(decoding):
    decoding.tell(PeerDown("d1"))
    assert row(decoding).attempt == 2
    assert not decoding.tell(
        tokens("p1", RID, 1, 8, reason="stop"),
        failed("p1", RID, retry=True),
        staged("p2", RID, Stage.DECODE),
        tokens("p1", "nobody", 0, 1),
    )
    assert row(decoding).output == [7]


def test_a_stop_text_ends_the_request_and_tokens_past_it_do_not_count(decoding):
    decoding.stops[RID] = 2
    actions = decoding.tell(tokens("d1", RID, 1, 8, 9))
    assert kinds(actions) == ["Detokenize", "Reply", "Close > p1", "Close > d1", "Reply", "Release"]
    assert replies(actions)[0] == Delta(rid=RID, start=1, ids=[8], text="ij")
    assert (done(actions).reason, done(actions).usage.completion_tokens) == ("stop", 2)


def test_a_stop_text_found_in_the_last_tokens_is_the_reason(decoding):
    decoding.stops[RID] = 2
    actions = decoding.tell(tokens("d1", RID, 1, 8, 9, reason="length"))
    end = done(actions)
    assert (end.reason, end.usage.completion_tokens, end.receipt.adopted) == ("stop", 2, 3)
    assert sent(actions, kind=Close) == [Close(rid=RID, attempt=1, outputs=2, reason="stop")] * 2


def test_a_first_token_that_ends_it_all(served):
    served.tell(submit(max_tokens=1))
    actions = served.tell(tokens("p1", RID, 0, 7, reason="length"))
    assert done(actions).reason == "length"
    assert sent(actions, kind=Close) == [Close(rid=RID, attempt=1, outputs=1, reason="length")]


def test_words_that_come_late_are_ignored(decoding):
    decoding.tell(cancel())
    assert not decoding.tell(Detokenized(RID, 1, (8,), "i", None, False), Detokenized("nobody", 0, (), "", None, True))


# ---------------------------------------------------------------- ends


def test_cancelling_while_nobody_has_it(broker):
    broker.tell(submit())
    assert done(broker.tell(cancel())).reason == "cancelled"


@pytest.mark.parametrize("stage", [Stage.QUEUED, Stage.PREFILL, Stage.MOVING])
def test_cancelling_on_the_prefill_side(served, stage):
    served.tell(submit(), staged("p1", RID, stage))
    actions = served.tell(cancel())
    assert sent(actions) == [Close(rid=RID, attempt=1, reason="cancelled")] and row(served).stage is Stage.CANCELLED
    end = done(actions)
    assert (end.reason, end.ttft_s, end.receipt.prefill_instance) == ("cancelled", None, "p1")


def test_cancelling_while_it_decodes_and_once_more(decoding):
    actions = decoding.tell(cancel())
    assert kinds(actions) == ["Detokenize", "Close > p1", "Close > d1", "Reply", "Release"]
    assert done(actions).receipt == Receipt(prompt_tokens=3, prefill_instance="p1", decode_instance="d1")
    assert replies(decoding.tell(cancel())) == [done(actions)]
    assert not decoding.tell(tokens("d1", RID, 1, 8))


def test_another_client_that_cancels_is_told_of_the_end_too(decoding):
    actions = decoding.tell(cancel(client=b"other"))
    assert done(actions) == done(actions, b"other")


def test_unknown_requests_can_be_neither_cancelled_nor_attached_to(broker):
    for question in (cancel("x"), attach(0, "x")):
        assert replies(broker.tell(question)) == [Refused(key="x", reason="no request x is known here")]


def test_a_deadline_ends_it(served):
    served.tell(submit(deadline_s=2.0))
    assert not only(served.later(1.9), Reply)
    actions = served.later(0.2)
    assert done(actions).reason == "deadline" and row(served).stage is Stage.FAILED


def test_a_deadline_after_the_end_is_nothing(decoding):
    decoding.tell(submit("b", deadline_s=1.0), cancel("00002a-2"))
    assert not only(decoding.later(1.5), Reply)


def test_an_ended_request_is_forgotten_after_the_grace(decoding):
    decoding.tell(cancel())
    decoding.tell(Undelivered(b"c", row(decoding).outbox[-1], gone=False))
    decoding.later(2.1)
    assert not decoding.core.table.rows and not decoding.core.table.keys


@pytest.mark.parametrize("ask", [attach(0), submit()])
def test_an_ended_request_is_kept_while_its_client_asks_but_not_for_ever(decoding, ask):
    decoding.tell(cancel())
    ended_at = decoding.now
    while RID in decoding.core.table.rows and decoding.now < ended_at + 100.0:
        assert isinstance(replies(decoding.tell(ask))[-1], Done)
        decoding.later(1.5)
    assert LIMITS.patience_s < decoding.now - ended_at <= LIMITS.patience_s + LIMITS.client_grace_s + 1.5


def test_while_the_last_words_are_asked_for_nothing_else_ends_it_or_starts_it_over(decoding):
    core = decoding.core
    core.handle(cancel(), 0.0)
    assert not core.handle(cancel(), 0.0)
    assert not sent(core.handle(PeerDown("d1"), 0.0), kind=Assign)
    core.check()
    assert done(core.handle(Detokenized(RID, 1, (), "", None, True), 0.0)).reason == "cancelled"


# ---------------------------------------------------------------- clients that are not there


def test_a_full_client_is_tried_again_in_order(decoding):
    first = replies(decoding.tell(tokens("d1", RID, 1, 8)))[0]
    decoding.tell(Undelivered(b"c", first, gone=False))
    assert not replies(decoding.tell(tokens("d1", RID, 2, 9)))
    assert replies(decoding.later(0.06)) == [first, Delta(rid=RID, start=2, ids=[9], text="j")]


def test_a_client_that_left_may_come_back_within_the_grace(decoding):
    delta = replies(decoding.tell(tokens("d1", RID, 1, 8)))[0]
    decoding.tell(Undelivered(b"c", delta, gone=True))
    assert not replies(decoding.tell(tokens("d1", RID, 2, 9)))
    decoding.now += 1.9
    again = decoding.tell(attach(1, client=b"new"))
    assert replies(again, b"new") == [delta, Delta(rid=RID, start=2, ids=[9], text="j")]
    decoding.later(1.0)
    assert row(decoding).reason is None


def test_a_client_that_left_and_came_by_its_key_stays(decoding):
    delta = replies(decoding.tell(tokens("d1", RID, 1, 8)))[0]
    decoding.tell(Undelivered(b"c", delta, gone=True), submit(client=b"new"))
    decoding.later(3.0)
    assert row(decoding).reason is None


def test_a_client_that_stays_away_cancels_its_request(decoding):
    delta = replies(decoding.tell(tokens("d1", RID, 1, 8)))[0]
    decoding.tell(Undelivered(b"c", delta, gone=True))
    actions = decoding.later(2.1)
    assert sent(actions, kind=Close) and not replies(actions) and row(decoding).stage is Stage.CANCELLED


def test_what_is_undelivered_to_others_or_is_no_letter_changes_nothing(decoding):
    delta = row(decoding).outbox[0]
    decoding.tell(
        Undelivered(b"other", delta, gone=True),
        Undelivered(b"c", Accepted(key="k", rid=RID, prompt_tokens=3), gone=True),
        Undelivered(b"c", Refused(key="k", reason="no"), gone=True),
    )
    assert row(decoding).client == b"c" and row(decoding).sent == 1


def test_attaching_sends_what_is_missing_or_a_sign_of_life(decoding):
    assert replies(decoding.tell(attach(0))) == [row(decoding).outbox[0]]
    assert replies(decoding.tell(attach(1))) == [Delta(rid=RID, start=1, ids=[], text="")]


def test_text_without_tokens_at_the_end_is_sent_again(decoding):
    decoding.core.handle(cancel(), 0.0)
    decoding.core.handle(Detokenized(RID, 1, (), "tail", None, True), 0.0)
    tail, end = replies(decoding.tell(attach(1)))
    assert tail == Delta(rid=RID, start=1, ids=[], text="tail") and end.reason == "cancelled"


# ---------------------------------------------------------------- workers that are lost


def test_patience_without_a_prefill_instance_is_not_prolonged_by_others(broker):
    broker.tell(submit())
    broker.now = 9.0
    broker.tell(ready("d1", "decode"), PeerUp("d1"))
    end = done(broker.later(1.1))
    assert (end.reason, end.error) == ("error", "no prefill instance for 10 s")


def test_a_waiting_request_goes_to_the_first_that_comes(broker):
    broker.tell(submit(), ready("p1", "prefill"))
    assert row(broker).prefill is None  # no connection yet
    assert sent(broker.tell(PeerUp("p1")), "p1", Assign)
    assert ("patience", RID) not in broker.core.timers


@pytest.mark.parametrize("larger", [None, "lost"])
def test_what_no_prefill_instance_could_begin_anew_fails_at_once(broker, larger):
    """Ten tokens with its output: those that prefill hold eight. One that is lost may come back, and held more."""
    for iid, role, blocks in (("p1", "prefill", 2), ("d1", "decode", 10), ("p2", "prefill", 10)):
        if iid != "p2" or larger == "lost":
            broker.tell(ready(iid, role, capacity=capacity(blocks=blocks)), PeerUp(iid))
    if larger == "lost":
        broker.tell(PeerDown("p2"))
        broker.core.members.lose(broker.core.members.by_iid["p2"], "silent")
    broker.tell(submit(prompt=range(1, 7), max_tokens=20), staged("p1", RID, Stage.PREFILL))
    broker.tell(tokens("p1", RID, 0, 7), staged("d1", RID, Stage.WAITING), staged("d1", RID, Stage.DECODE))
    broker.tell(tokens("d1", RID, 1, 8, 9, 10))
    actions = broker.tell(PeerDown("d1"))
    if larger == "lost":
        assert row(broker).reason is None and ("patience", RID) in broker.core.timers
        return
    end = done(actions)
    assert end.reason == "error" and "10 tokens, its output so far included, fit into no prefill instance" in end.error


@pytest.mark.parametrize("stage", [Stage.QUEUED, Stage.PREFILL, Stage.MOVING])
def test_a_lost_prefill_instance_is_replaced_by_another(served, stage):
    served.tell(submit(), staged("p1", RID, stage))
    actions = served.tell(PeerDown("p1"))
    (assign,) = sent(actions, "p2", Assign)
    assert (assign.attempt, assign.output) == (2, []) and row(served).stage is Stage.QUEUED


@pytest.mark.parametrize("stage", [Stage.WAITING, Stage.DECODE])
def test_a_lost_decode_instance_keeps_the_output_and_goes_on(served, stage):
    served.tell(submit(), tokens("p1", RID, 0, 7), staged("d1", RID, stage))
    actions = served.tell(PeerDown("d1"))
    (assign,) = sent(actions, kind=Assign)
    assert (assign.attempt, assign.prompt, assign.output) == (2, [1, 2, 3], [7])
    assert Close(rid=RID, attempt=1) in sent(actions, "d1")
    last = served.tell(tokens("p1", RID, 1, 8, attempt=2))
    assert replies(last) == [Delta(rid=RID, start=1, ids=[8], text="i")]


def test_a_decode_instance_lost_after_the_prefill_instance_let_go(decoding):
    assert not sent(decoding.tell(PeerDown("p1")), kind=Assign)
    assert row(decoding).attempt == 1


def test_giving_up_after_many_attempts(served):
    served.tell(submit())
    served.tell(failed("p1", RID, retry=True))
    served.tell(failed(row(served).prefill, RID, retry=True, attempt=2))
    end = done(served.tell(failed(row(served).prefill, RID, retry=True, attempt=3)))
    assert (end.reason, end.error) == ("error", "given up after 3 attempts: oh no")


def test_a_failure_for_good_ends_it(served):
    served.tell(submit())
    end = done(served.tell(failed("p1", RID, retry=False)))
    assert (end.reason, end.error) == ("error", "oh no") and row(served).stage is Stage.FAILED


def test_the_failure_of_one_that_holds_it_no_more_is_ignored(decoding):
    assert not decoding.tell(failed("p1", RID, retry=True)) and row(decoding).attempt == 1


def test_silence_is_a_loss_and_any_message_a_sign_of_life(served):
    served.later(4.0)
    served.tell(heartbeat("p1"))
    served.later(2.0)  # it may have been the broker that did not listen
    assert served.core.counters["workers_lost"] == 0
    served.later(0.2)
    lost = [status.iid for status in served.core.members.status() if status.state == "lost"]
    assert lost == ["d1", "d2", "p2"] and served.core.counters["workers_lost"] == 3


def test_a_restarted_worker_loses_what_it_had(served):
    served.tell(submit())
    actions = served.tell(ready("p1", "prefill", incarnation=2))
    assert sent(actions, "p1", Assign) and row(served).attempt == 2
    assert not served.tell(staged("p1", RID, Stage.PREFILL))  # by the old one
    assert served.core.counters["workers_replaced"] == 1


def test_registering_again_loses_nothing(served):
    served.tell(submit())
    assert not sent(served.tell(ready("p1", "prefill")), kind=Assign) and row(served).attempt == 1


def test_a_lost_worker_gets_nothing_until_it_is_heard_over_a_new_connection(served):
    served.tell(PeerDown("p1"), PeerDown("p2"), submit(), heartbeat("p1"))
    assert row(served).prefill is None
    served.tell(PeerUp("p1"))
    assert row(served).prefill is None
    assert sent(served.tell(heartbeat("p1")), "p1", Assign)


def test_late_words_of_a_lost_worker_do_not_give_it_the_request(served):
    served.tell(submit(), tokens("p1", RID, 0, 7), PeerDown("d1"))
    served.tell(staged("d1", RID, Stage.WAITING), heartbeat("d1", Hold(RID, 1, Stage.DECODE, 1)))
    assert row(served).holder == "p1"
    served.tell(PeerUp("d1"), heartbeat("d1", Hold(RID, 1, Stage.DECODE, 1)))
    assert row(served).holder == "d1"


def test_unknown_workers_are_not_heard(broker):
    assert not broker.tell(heartbeat("p9"), tokens("p9", RID, 0, 1)) and not broker.tell(PeerDown("p9"))


def test_any_word_of_a_worker_brings_it_back(served):
    served.tell(PeerDown("p1"), PeerUp("p1"), FromWorker(iid="p1", incarnation=1))
    assert served.core.members.by_iid["p1"].lost is None


# ---------------------------------------------------------------- beats


def test_what_nobody_wants_is_closed(served):
    served.tell(submit())
    actions = served.tell(heartbeat("p1", Hold(RID, 1, Stage.QUEUED, 0), Hold("old", 3, Stage.DECODE, 5)))
    assert actions == [Send("p1", Close(rid="old", attempt=3))]


def test_what_was_assigned_and_is_not_held_is_assigned_again(served):
    served.tell(submit())
    assert not served.tell(heartbeat("p1"))  # it may be on its way
    served.now = 0.3
    (assign,) = sent(served.tell(heartbeat("p1")), "p1", Assign)
    assert assign.attempt == 1
    assert not served.tell(heartbeat("p1"))


def test_what_the_decode_instance_lost_starts_over(decoding):
    assert sent(decoding.tell(heartbeat("d1")), kind=Assign)[0].attempt == 2


def test_lost_news_of_the_stage_come_with_the_beat(served):
    served.tell(submit(), tokens("p1", RID, 0, 7))
    actions = served.tell(heartbeat("d1", Hold(RID, 1, Stage.WAITING, 1)))
    assert actions == [Send("p1", Close(rid=RID, attempt=1))] and row(served).holder == "d1"
    again = served.tell(heartbeat("p1", Hold(RID, 1, Stage.MOVING, 1)))
    assert again == [Send("p1", Close(rid=RID, attempt=1))]


def test_a_reservation_elsewhere_is_closed_once_it_decodes(decoding):
    actions = decoding.tell(heartbeat("d2", Hold(RID, 1, Stage.MOVING, 0)))
    assert actions == [Send("d2", Close(rid=RID, attempt=1))]


def test_lost_tokens_and_a_lost_end_are_asked_for(decoding):
    more = decoding.tell(heartbeat("d1", Hold(RID, 1, Stage.DECODE, 3)))
    assert more == [Send("d1", Resend(rid=RID, attempt=1, start=1))]
    decoding.tell(tokens("d1", RID, 1, 8, 9))
    end = decoding.tell(heartbeat("d1", Hold(RID, 1, Stage.DONE, 4)))
    assert end == [Send("d1", Resend(rid=RID, attempt=1, start=3))]


def test_a_worker_that_keeps_an_ended_request_is_told_again(decoding):
    decoding.tell(cancel())
    assert decoding.tell(heartbeat("d1", Hold(RID, 1, Stage.DONE, 4))) == [Send("d1", Close(rid=RID, attempt=1))]


# ---------------------------------------------------------------- views and status


def test_views_are_numbered_and_leave_out_the_lost(served):
    views = sent(served.tell(PeerDown("p1")), "d1", Membership)
    assert [each.iid for each in views[0].instances] == ["p2", "d1", "d2"]
    assert sent(served.later(0.1), "d1", Membership) == []  # nothing is new
    assert served.core.deadline() == pytest.approx(served.now + 0.1)
    (later,) = [view for _ in range(8) for view in sent(served.later(0.1), "d1", Membership)]
    assert later.number > views[0].number and later.epoch == 42


def test_status_tells_what_a_beat_counts(served):
    said = structs.replace(heartbeat("d1"), counters={"duplicate": 2}, slots_used=5)
    served.tell(said)
    (status,) = replies(served.tell(FromClient(b"c", Inspect())))
    found = {each.iid: (each.counters, each.slots_used) for each in status.instances}
    assert found["d1"] == ({"duplicate": 2}, 5) and found["d2"] == ({}, 0)


def test_status_tells_who_is_there_and_who_can_never_be_paired(served):
    served.tell(submit(), ready("d2", "decode", fingerprint=fingerprint(dtype="f32")), PeerDown("p2"))
    (status,) = replies(served.tell(FromClient(b"c", Inspect())))
    notes = {each.iid: (each.state, each.note) for each in status.instances}
    assert notes["p2"] == ("lost", "connection lost") and notes["d1"] == ("ready", "")
    assert notes["d2"] == ("ready", f"never paired with p1: dtype differs: f32 and {FINGERPRINT.dtype}")
    assert (status.requests, status.model, status.counters["accepted"]) == ({"queued": 1}, "m", 1)


def test_status_tells_what_the_monitor_said_last_and_when(served):
    (status,) = replies(served.tell(FromClient(b"c", Inspect())))
    assert status.monitor is None
    served.tell(ClusterView(epoch=1, number=7, loads=[], flip="idle"))
    served.now = 0.5
    (status,) = replies(served.tell(FromClient(b"c", Inspect())))
    assert status.monitor == MonitorStatus(number=7, age_s=0.5, flip="idle")


# ---------------------------------------------------------------- what must not be


def test_nonsense_is_refused(broker):
    for wrong in (object(), Release("x")):
        with pytest.raises(Broken):
            broker.core.handle(wrong, 0.0)
    broker.tell(submit())
    broker.core.timers.set(("tea", RID), 0.0)
    with pytest.raises(Broken):
        broker.core.tick(0.0)


def test_check_finds_a_request_held_by_one_who_is_not_there(served):
    served.tell(submit())
    served.core.table.assign(row(served), "p9", 1)
    with pytest.raises(Broken, match="held by p9"):
        served.core.check()
    served.core.table.assign(row(served), "p1", 1)


def test_words_are_asked_for_in_order(decoding):
    words = only(decoding.tell(tokens("d1", RID, 1, 8), tokens("d1", RID, 2, 9), cancel()), Detokenize)
    assert [(word.start, word.ids, word.final) for word in words] == [(1, (8,), False), (2, (9,), False), (3, (), True)]


# ---------------------------------------------------------------- unlike workers, slow readers, long lives


def test_a_prefill_instance_that_nobody_can_pair_with_gets_nothing(broker):
    other = fingerprint(dtype="f32")
    broker.tell(ready("p1", "prefill", fingerprint=other), PeerUp("p1"), ready("d1", "decode"), PeerUp("d1"))
    assert not sent(broker.tell(submit()), kind=Assign)
    assert sent(broker.tell(ready("p2", "prefill"), PeerUp("p2")), "p2", Assign)


def test_a_prefill_instance_gets_only_what_it_holds(broker):
    broker.tell(ready("p1", "prefill", capacity=capacity(blocks=1)), PeerUp("p1"))
    broker.tell(ready("p2", "prefill", capacity=capacity(blocks=8)), PeerUp("p2"))
    assert sent(broker.tell(submit(prompt=range(1, 20))), "p2", Assign)
    assert sent(broker.tell(submit("b")), "p1", Assign)


def test_thousands_that_wait_are_placed_at_once_when_a_worker_comes():
    limits = Limits(context=40, vocabulary=100, max_open=5000)
    core = Broker(limits, Rules(), epoch=42, rng=Random(1), now=0.0)
    for number in range(4000):
        core.handle(submit(f"k{number}"), 0.0)
    start = time.thread_time()
    core.handle(ready("d1", "decode"), 1.0)
    core.handle(ready("p1", "prefill"), 1.0)
    assert len(sent(core.handle(PeerUp("p1"), 1.0), "p1", Assign)) == 4000
    assert time.thread_time() - start < 2.0  # it took minutes when every row summed all others
    core.check()


def test_a_slow_reader_gets_its_end_after_the_grace(decoding):
    ended = decoding.tell(tokens("d1", RID, 1, 8, 9, 10, reason="length"))
    delta = replies(ended)[0]
    decoding.tell(Undelivered(b"c", delta, gone=False), Undelivered(b"c", replies(ended)[1], gone=False))
    decoding.core.timers.clear(("retry", RID))
    decoding.later(2.1)
    assert RID in decoding.core.table.rows
    assert isinstance(replies(decoding.tell(attach(1)))[-1], Done)
    decoding.later(2.1)
    assert RID not in decoding.core.table.rows


def test_a_slow_reader_is_not_waited_for_for_ever(decoding):
    ended = decoding.tell(tokens("d1", RID, 1, 8, 9, 10, reason="length"))
    decoding.tell(Undelivered(b"c", replies(ended)[0], gone=False))
    decoding.core.timers.clear(("retry", RID))
    for _ in range(7):
        decoding.later(2.1)
    assert RID not in decoding.core.table.rows


def test_a_worker_lost_for_long_is_given_up(served):
    served.tell(PeerDown("p2"))
    assert not only(served.later(599.0), Disconnect)
    assert [action.peer for action in only(served.later(2.0), Disconnect)] == ["p2"]
    assert "p2" not in {status.iid for status in served.core.members.status()}


def test_no_worker_ends_a_row_by_its_stage(decoding):
    assert not decoding.tell(staged("d1", RID, Stage.DONE)) and row(decoding).stage is Stage.DECODE


def test_no_worker_takes_the_brokers_name(broker):
    assert broker.tell(ready("broker", "decode")) == [] and broker.core.members.by_iid == {}
