"""Requests with several choices: one prefill for all that have no output, then each on its own."""

import pytest

from tests.core.broker.serving import RID, assigned, attach, cancel, done, end, refusal, replies, serving, submit
from tests.core.build import capacity, close, ending, failed, heartbeat, ready, staged, tokens
from tests.core.reading import kinds, only, sent
from tetri.core.actions import Release, Undelivered
from tetri.core.broker.requests import needed_bytes
from tetri.cost import Cost
from tetri.request import Stage, TokenLogprob
from tetri.wire.clients import Accepted, Delta, Done, Refused
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.handover import Sibling
from tetri.wire.messages import Assign, Close, Hold, LoneStep, Membership, TokenItem

SECOND, THIRD = f"{RID}.1", f"{RID}.2"
ALL = (RID, SECOND, THIRD)


def item(iid, *parts):
    """One Tokens with a part for each choice: (id, start, ids) or (id, start, ids, attempt)."""
    made = [TokenItem(rid, *attempt or (1,), start, list(ids)) for rid, start, ids, *attempt in parts]
    return tokens(iid, RID, 0).changed(items=made)


FIRST = item("p1", *((rid, 0, [index]) for index, rid in enumerate(ALL)))
MOVED = [staged("d1", rid, Stage.WAITING) for rid in ALL]


def begin(*events, workers=("p1", "p2", "d1", "d2"), n=3, limits=None, **asked):
    large = {"capacity": capacity(max_batch=16, blocks=99)}
    told = serving(*((iid, large) for iid in workers), limits=limits)
    told.tell(submit(n=n, **asked), *events)
    return told


@pytest.fixture
def served():
    return begin()


@pytest.fixture
def decoding():
    """All three decode on d1."""
    return begin(FIRST, *MOVED)


def assigns(actions):
    return [(each.rid, each.attempt, [*each.siblings]) for each in sent(actions, kind=Assign)]


def deltas(actions, client=b"c"):
    return [(each.choice, each.start, each.ids) for each in replies(actions, client) if isinstance(each, Delta)]


def dones(actions, client=b"c"):
    return [(each.choice, each.reason) for each in replies(actions, client) if isinstance(each, Done)]


# ---------------------------------------------------------------- the way of a request


def test_one_assign_names_all_choices_and_each_has_a_stream_and_an_end_of_its_own():
    told = serving(("p1", {"capacity": capacity(max_batch=3)}), ("d1", {"capacity": capacity(max_batch=3)}))
    actions = told.tell(submit(n=3, seed=7))
    assert replies(actions) == [Accepted(key="k", rid=RID, prompt_tokens=3, max_tokens=4)]
    (assign,) = sent(actions, kind=Assign)
    assert (assign.rid, assign.sampling.seed) == (RID, 7)
    assert assign.siblings == [Sibling(SECOND, 1, 8), Sibling(THIRD, 1, 9)]
    assert told.status().requests == {"queued": 3}
    assert deltas(told.tell(FIRST)) == [(0, 0, [0]), (1, 0, [1]), (2, 0, [2])]
    assert told.status().requests == {"moving": 3}
    assert kinds(told.tell(*MOVED)) == ["Close > p1"] * 3
    assert dones(told.tell(*ending("d1", SECOND, 1, 8, reason="stop"))) == [(1, "stop")]
    assert told.status().requests == {"waiting": 2}
    last = told.tell(*ending("d1", RID, 1, 7, 8, 9), *ending("d1", THIRD, 1, 4, reason="stop"))
    assert dones(last) == [(0, "length"), (2, "stop")]
    assert [each.usage.completion_tokens for each in replies(last) if isinstance(each, Done)] == [4, 2]
    assert only(last, Release) == [Release(RID), Release(THIRD)] and not told.status().requests
    told.later(2.1)
    assert refusal(told.tell(attach(0))) == f"no request {RID} is known here"


def test_a_request_without_a_seed_draws_one_for_all():
    (assign,) = sent(begin().tell(submit("k2", n=2, seed=None)), kind=Assign)
    assert assign.sampling.seed is not None and assign.siblings[0].seed == assign.sampling.seed + 1


@pytest.mark.parametrize(
    "decoders, wrong, reason",
    [
        ([{}], {"temperature": 0.0}, "n must be 1 when temperature is 0"),
        ([{}], {"n": 17}, "n must be at most 16, got 17"),
        ([{"max_batch": 3}, {"max_batch": 2}], {"n": 4}, "can begin more than 3 choices of 3 prompt tokens at once"),
        ([{"blocks": 8}], {"n": 3, "prompt": [1] * 9}, "n is 3: no decode instance can begin more than 2 choices of 9"),
        ([{"blocks": 99, "max_batch": 2}, {"blocks": 8}], {"n": 3, "prompt": [1] * 9}, "more than 2 choices"),
        ([{}], {"n": 1, "logit_bias": {100: 1.0}}, "an id of logit_bias is outside the model's vocabulary of 100"),
        ([{}], {"n": 1, "logit_bias": {id: 0.5 for id in range(1025)}}, "logit_bias takes at most 1024 token ids"),
        ([{}], {"n": 1, "stop_token_ids": [3, 100]}, "an id of stop_token_ids is outside the model's vocabulary"),
    ],
)
def test_what_can_never_be_served_is_refused_with_the_reason(decoders, wrong, reason):
    made = [(f"d{at}", {"capacity": capacity(**{"max_batch": 16, **each})}) for at, each in enumerate(decoders)]
    told = serving("p1", *made)
    assert reason in refusal(told.tell(submit(**{"n": 2, **wrong})))
    fits = {"n": min(wrong.get("n", 2), 2), "logit_bias": {99: 1.0}, "stop_token_ids": [99], "prompt": [1] * 9}
    assert isinstance(replies(told.tell(submit("k2", **fits)))[0], Accepted)


def test_without_decode_instances_any_number_is_accepted():
    assert isinstance(replies(serving().tell(submit(n=16)))[0], Accepted)


@pytest.mark.parametrize("default, most", [(1, 1), (16, 16), (1 << 40, 37)])
def test_the_default_of_a_request_is_its_limit_where_so_many_fit(default, most):
    told = begin(workers=("p1", "d1"))
    assert replies(told.tell(submit("k2", max_tokens=None, default_tokens=default)))[0].max_tokens == most


def test_more_tokens_at_least_than_by_default_are_refused():
    why = refusal(serving().tell(submit(max_tokens=None, default_tokens=16, min_tokens=17)))
    assert why == "min_tokens (17) must not exceed max_tokens (16, the default)"


def test_each_choice_counts_as_an_open_one():
    told = begin(limits={"max_open": 3})
    (refused,) = replies(told.tell(submit("late")))
    assert refused == Refused(key="late", reason="3 choices are open, try later", retry_after_s=1.0)
    told.tell(FIRST, *ending("p1", SECOND, 1, 8, reason="stop"))
    assert isinstance(replies(told.tell(submit("late")))[0], Accepted)


def test_the_prompt_counts_once_in_the_account_of_memory_and_each_output_until_it_ends():
    told = begin(max_tokens=20)
    whole, one = needed_bytes(3, 20, 3), needed_bytes(3, 20, 2)
    assert told.core.table.weight == whole < 3 * needed_bytes(3, 20) and one < whole
    told.tell(FIRST, *MOVED, *ending("d1", SECOND, 1, 8, reason="stop"))
    assert told.core.table.weight == whole - 24 * 18
    told.tell(cancel())
    told.later(2.1)
    assert told.core.table.weight == 0


def test_choices_share_the_work_of_their_prefill():
    cost = Cost(prefill=((1.0, 1.0), (4.0, 1.0)))
    told = serving("p1", "p2", ("d1", {"capacity": capacity(max_batch=16)}), cost=cost, chunk_tokens=4)
    assert assigned(told.tell(submit("a", [1] * 4, n=5))) == [("p1", RID, 1)]
    goes = [assigned(told.tell(submit(key, [1] * 4)))[0][0] for key in "bcd"]
    assert goes == ["p2", "p1", "p2"]  # a second for each prompt
    assert told.core.table.work_ns == {"p1": 2 * 10**9, "p2": 2 * 10**9}
    told.tell(item("p1", *((f"{RID}.{index}" if index else RID, 0, [7]) for index in range(5))))
    assert told.core.table.work_ns == {"p1": 10**9, "p2": 2 * 10**9}


# ---------------------------------------------------------------- its client


def test_the_same_submit_again_is_answered_with_all_choices(decoding):
    actions = decoding.tell(submit(n=3, client=b"again"))
    (accepted, *first) = replies(actions, b"again")
    assert accepted == Accepted(key="k", rid=RID, prompt_tokens=3, max_tokens=4)
    assert deltas([*actions, *decoding.later()], b"again") == [(index, 0, [index]) for index in range(3)] and first
    assert "another request" in refusal(decoding.tell(submit(n=2)))
    assert deltas(decoding.tell(item("d1", (THIRD, 1, [9]))), b"again") == [(2, 1, [9])]


def test_an_attach_names_a_choice_and_all_go_on_at_the_new_connection(decoding):
    second = Delta(rid=RID, start=1, ids=[9], text="j", choice=1)
    assert replies(decoding.tell(item("d1", (SECOND, 1, [9])))) == [second]
    decoding.tell(Undelivered(b"c", second, True))
    decoding.tell(item("d1", (THIRD, 1, [8])))
    assert deltas(decoding.tell(attach(0, client=b"new", choice=2)), b"new") == [(2, 0, [2]), (2, 1, [8])]
    assert deltas(decoding.later(), b"new") == [(1, 1, [9])]  # what the connection before has not got
    assert deltas(decoding.tell(attach(1, client=b"new", choice=0)), b"new") == [(0, 1, [])]
    decoding.later(3.0)
    assert decoding.status().requests == {"waiting": 3}


def test_a_choice_that_a_request_does_not_have_is_refused(decoding):
    why = "the request has 3 choices, and none of index 3"
    assert replies(decoding.tell(attach(0, choice=3))) == [Refused(key=RID, reason=why)]


@pytest.mark.parametrize("ask", [cancel(), cancel("k"), end()])
def test_whoever_cancels_a_request_ends_all_that_is_open(decoding, ask):
    decoding.tell(*ending("d1", SECOND, 1, 8, reason="stop"))
    actions = decoding.tell(ask)
    cancelled = [(0, "cancelled"), (2, "cancelled")]
    assert [each for each in dones(actions) if each != (1, "stop")] == cancelled
    if ask.client != b"c":
        assert dones(actions, ask.client) == [(1, "stop"), *cancelled]
    assert [(each.rid, each.reason) for each in sent(actions, "d1", Close)] == [
        (RID, "cancelled"),
        (THIRD, "cancelled"),
    ]
    assert dones(decoding.tell(ask), ask.client) == [(0, "cancelled"), (1, "stop"), (2, "cancelled")]


def test_who_repeats_a_cancel_before_the_end_is_noted_once(decoding):
    decoding.edge = False  # the texts are not back yet
    decoding.tell(*[cancel(client=b"x")] * 3, end())
    assert decoding.core.table.requests[RID].watchers == [b"x", end().client]


def test_a_deadline_ends_all_that_is_open():
    told = begin(FIRST, *ending("p1", RID, 1, 8, reason="stop"), deadline_s=1.0)
    assert dones(told.later(1.0)) == [(1, "deadline"), (2, "deadline")]


def test_a_client_that_stays_away_cancels_all_that_is_open(decoding):
    decoding.tell(Undelivered(b"c", Delta(rid=RID, start=0, ids=[], text=""), True))
    closed = sent(decoding.later(2.1), "d1", Close)
    assert {(each.rid, each.reason) for each in closed} == {(rid, "cancelled") for rid in ALL}


def test_a_request_is_kept_until_some_time_after_its_last_choice_has_ended(decoding):
    decoding.tell(*ending("d1", SECOND, 1, 8, reason="stop"))
    decoding.later(5.0)
    assert dones(decoding.tell(attach(2, choice=1))) == [(1, "stop")]
    decoding.tell(cancel())
    decoding.later(1.9)
    assert dones(decoding.tell(attach(2, choice=1))) == [(1, "stop")]  # this prolongs it
    decoding.later(1.9)
    assert isinstance(replies(decoding.tell(attach(0)))[0], Delta)
    decoding.later(2.1)
    assert refusal(decoding.tell(attach(0))) == f"no request {RID} is known here"


def test_a_full_client_gets_the_rest_of_each_choice_later(decoding):
    (second,) = replies(decoding.tell(item("d1", (SECOND, 1, [9]))))
    decoding.tell(Undelivered(b"c", second, False))
    assert not replies(decoding.tell(item("d1", (RID, 1, [8]), (SECOND, 2, [7]))))
    found = deltas([action for _ in range(4) for action in decoding.later(0.06)])
    assert sorted(found) == [(0, 1, [8]), (1, 1, [9]), (1, 2, [7])]


# ---------------------------------------------------------------- another attempt


def test_choices_without_output_start_over_together_and_others_alone(served):
    assert assigns(served.tell(PeerDown("p1"))) == [(RID, 2, [Sibling(SECOND, 2, 6), Sibling(THIRD, 2, 7)])]
    served.tell(item("p2", (SECOND, 0, [9], 2)))
    actions = served.tell(PeerUp("p1"), ready("p1", "prefill", incarnation=2), PeerDown("p2"))
    assert assigns(actions) == [(RID, 3, [Sibling(THIRD, 3, 7)]), (SECOND, 3, [])]
    assert [each.output for each in sent(actions, kind=Assign)] == [[], [9]]
    assert sent(actions, kind=Assign)[1].sampling.seed == 6


def test_a_choice_that_is_lost_alone_starts_over_alone(decoding):
    actions = decoding.tell(heartbeat("d1", *(Hold(rid, 1, Stage.WAITING, 1) for rid in (RID, THIRD))))
    assert assigns(actions) == [(SECOND, 2, [])] and sent(actions, kind=Assign)[0].output == [1]
    assert sent(actions, "d1", Close) == [close(SECOND)]
    assert decoding.status().requests == {"waiting": 2, "queued": 1}


def test_what_a_prefill_instance_gives_up_before_a_token_starts_over_once_for_all(served):
    given_up = [failed("p1", rid, retry=True, avoid=["p1", "d1"]) for rid in ALL]
    actions = served.tell(*given_up)
    assert assigns(actions) == [(RID, 2, [Sibling(SECOND, 2, 6), Sibling(THIRD, 2, 7)])]
    assert sent(actions, kind=Assign)[0].avoid == ["p1", "d1"]


@pytest.mark.parametrize("lost", ["d1", "d9"], ids=["known", "unknown"])
def test_a_decode_instance_that_is_lost_before_a_token_starts_them_over_once_for_all(served, lost):
    """Some of their KV had landed there, which the prefill instance alone knows."""
    served.tell(PeerDown("d1"))
    actions = served.tell(*(failed("p1", rid, retry=True).changed(lost=lost) for rid in ALL))
    assert assigns(actions) == [(RID, 2, [Sibling(SECOND, 2, 6), Sibling(THIRD, 2, 7)])]


def test_what_a_decode_instance_gives_up_starts_over_alone(decoding):
    assert assigns(decoding.tell(failed("d1", SECOND, retry=True))) == [(SECOND, 2, [])]


def test_a_lost_assign_names_all_again_once(served):
    (before,) = {each.serial for each in sent(served.later(1.0), kind=Membership)}
    assert not served.tell(heartbeat("p1", read=0))
    again = served.tell(heartbeat("p1", read=before))
    assert assigns(again) == [(RID, 1, [Sibling(SECOND, 1, 6), Sibling(THIRD, 1, 7)])]
    assert not served.tell(heartbeat("p1", read=before))


def test_only_what_an_instance_does_not_hold_is_assigned_again(served):
    (serial,) = {each.serial for each in sent(served.later(1.0), kind=Membership)}
    again = served.tell(heartbeat("p1", Hold(RID, 1, Stage.QUEUED, 0), read=serial))
    assert assigns(again) == [(SECOND, 1, [Sibling(THIRD, 1, 7)])]


def test_choices_that_no_decode_instance_can_begin_together_any_more_are_placed_alone():
    told = serving("p1", ("d1", {"capacity": capacity(max_batch=3)}), "d2")
    told.tell(submit(n=3), PeerDown("d1"))
    actions = told.tell(PeerDown("p1"), ready("p1", "prefill", incarnation=2), PeerUp("p1"))
    assert assigns(actions) == [(RID, 2, []), (SECOND, 2, []), (THIRD, 2, [])]


def test_choices_wait_together_for_a_prefill_instance_and_give_up_together():
    told = begin(workers=("d1",))
    assert assigns(told.tell(PeerUp("p1"), ready("p1", "prefill"))) == [
        (RID, 1, [Sibling(SECOND, 1, 6), Sibling(THIRD, 1, 7)])
    ]
    told = begin(workers=("d1",))
    assert dones(told.later(10.0)) == [(index, "error") for index in range(3)]


def test_an_error_ends_one_choice_and_the_others_go_on(decoding):
    assert dones(decoding.tell(failed("d1", SECOND, retry=False))) == [(1, "error")]
    assert decoding.status().requests == {"waiting": 2}


# ---------------------------------------------------------------- requests that kill


@pytest.mark.parametrize("decodes", [False, True])
def test_a_request_that_kills_in_a_lone_step_of_any_choice_ends_with_all(decodes):
    told = begin(workers=("p1", "p2", "p3", "d1"))
    (last,) = [actions for actions in (told.tell(PeerDown("p1"), PeerDown("p2")),) if actions]
    assert assigned(last)[-1] == ("p3", RID, 3) and sent(last, kind=Assign)[-1].alone
    where, rid, stage = ("d1", SECOND, Stage.WAITING) if decodes else ("p3", RID, Stage.PREFILL)
    if decodes:
        told.tell(item("p3", *((each, 0, [7], 3) for each in ALL)))
        told.tell(*(staged("d1", each, Stage.WAITING, 3) for each in ALL))
    told.tell(LoneStep(iid=where, incarnation=1, rid=rid, attempt=3, number=1, stage=stage))
    assert not assigned(told.tell(PeerDown(where)))
    actions = told.later(1.0)
    assert dones(actions) == [(index, "error") for index in range(3)]
    assert all("it kills workers: 3 of them" in each.error for each in replies(actions))
    assert told.status().counters["guilty"] == 1


def test_an_accused_request_whose_worker_comes_back_goes_on_with_all_choices():
    told = begin(workers=("p1", "p2", "p3", "d1"))
    told.tell(PeerDown("p1"), PeerDown("p2"))
    told.tell(LoneStep(iid="p3", incarnation=1, rid=RID, attempt=3, number=1, stage=Stage.PREFILL), PeerDown("p3"))
    assert assigns(told.tell(PeerUp("p3"), heartbeat("p3"))) == [
        (RID, 4, [Sibling(SECOND, 4, 6), Sibling(THIRD, 4, 7)])
    ]


# ---------------------------------------------------------------- log probabilities

LIKELY = [TokenLogprob(7, -0.5, {7: -0.5, 8: -1.5}), TokenLogprob(9, -2.0, {1: -0.1}), TokenLogprob(3, -4.5, {3: -4.5})]


def asked_for_logprobs(told, *, n=1):
    told.tell(submit("k2", n=n, logprobs=2))
    return told.core.table.named("k2").rid


def test_tokens_come_with_their_log_probabilities_and_again_after_an_attach(served):
    rid = asked_for_logprobs(served)
    (first,) = replies(served.tell(item("p2", (rid, 0, LIKELY[:1]))))
    assert (first.start, first.ids, first.text) == (0, LIKELY[:1], "h")
    served.tell(staged("d1", rid, Stage.DECODE), item("d1", (rid, 1, LIKELY[1:])))
    assert [each.ids for each in replies(served.tell(attach(0, rid)))] == [LIKELY[:1], LIKELY[1:]]
    (assign,) = sent(served.tell(PeerDown("d1")), "p2", Assign)
    assert assign.output == [7, 9, 3] and assign.sampling.logprobs == 2
    more, _ = replies(served.tell(item("p2", (rid, 3, LIKELY[:1], 2))))
    assert more.ids == LIKELY[:1]


def test_tokens_past_a_stop_text_lose_their_log_probabilities_too(served):
    rid = asked_for_logprobs(served)
    served.tell(item("p2", (rid, 0, LIKELY[:1])), staged("d1", rid, Stage.DECODE))
    served.stops[rid] = 2
    actions = served.tell(item("d1", (rid, 1, LIKELY[1:])))
    assert done(actions).usage.completion_tokens == 2
    assert [each.ids for each in replies(served.tell(attach(0, rid))) if isinstance(each, Delta)][-1] == [LIKELY[1]]


def test_log_probabilities_that_nobody_asked_for_are_dropped(served):
    assert deltas(served.tell(item("p1", (RID, 0, LIKELY[:1])))) == [(0, 0, [7])]


def test_a_worker_that_computes_no_log_probabilities_ends_a_choice_that_asks_for_them(served):
    rid = asked_for_logprobs(served)
    ended = done(served.tell(item("p2", (rid, 0, [7]))))
    assert (ended.reason, ended.error) == ("error", "p2 computes no log probabilities")
    assert ended.usage.completion_tokens == 0


def test_an_output_with_log_probabilities_counts_more(served):
    before = served.core.table.weight
    asked_for_logprobs(served, n=2)
    assert served.core.table.weight - before == needed_bytes(3, 4, 2) + 8 * (28 + 2 * 13)


def test_each_id_of_a_bias_and_each_that_stops_counts(served):
    before = served.core.table.weight
    served.tell(submit("k2", n=2, logit_bias={1: 1.0, 2: -1.0}, stop_token_ids=[5, 6, 7]))
    assert served.core.table.weight - before == needed_bytes(3, 4, 2) + 5 * 128
