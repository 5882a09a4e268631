"""Prompts from their assignment to the first token: chunks, tokens, letting go."""

import pytest

from tests.core.build import assign, capacity, close, grant, landed, offer, resend
from tests.core.driver import working
from tests.core.reading import added, kinds, only, sent
from tetri.core.actions import BROKER, AddRequest, Broken, Export, Free, RequestRejected
from tetri.core.prefill.scheduler import MOST_FAILED
from tetri.cost import Cost
from tetri.engine_request import Sampled, Span, StepDone
from tetri.policy.rules import Rules
from tetri.request import Slo
from tetri.wire.events import PeerDown
from tetri.wire.handover import Chunk, Drop, Offer
from tetri.wire.messages import Failed, Staged, Tokens


@pytest.fixture
def told():
    return working("p1", "d1")


def ageing(**changes):
    """A worker that computes a hundred tokens a second, short prompts first."""
    cost = Cost(prefill=((0.0, 0.0), (100.0, 1.0)))
    return working("p1", "d1", rules=Rules(order="ageing"), cost=cost, capacity=capacity(**changes), slots=30)


def test_a_chunk_holds_the_tail_of_one_prompt_and_the_heads_of_others():
    told = working("p1", "d1", capacity=capacity(max_batch=3))
    told.tell(assign("a", prompt=10), assign("b", prompt=3), assign("c", prompt=20))
    assert told.run() == [("a", 0, 8)]
    assert added(told.later()) == ["p:b:1", "p:c:1"] and told.chunk() == [("a", 8, 10), ("b", 0, 3), ("c", 0, 3)]
    told.tell(RequestRejected("p:c:1", "no"))  # the engine has room for the others only
    assert told.run() == [("a", 8, 10), ("b", 0, 3)]


def test_only_prompts_that_the_ledger_has_room_for_are_started(told):
    told.tell(offer("x", prompt=20, src="d9"))  # 5 of 10 blocks
    told.tell(assign("a", prompt=2), assign("b", prompt=20), assign("c", prompt=2))
    assert [told.run(), told.run()] == [[("a", 0, 2)], [("b", 0, 8)]]


def test_by_deadline_the_prompt_goes_first_that_is_late_first():
    """By its limit of TTFT, or by its deadline."""
    told = working("p1", "d1", rules=Rules(order="deadline"), capacity=capacity(blocks=60, max_batch=4), slots=30)
    limits = {"a": (None, 5.0), "b": (9.0, 2.0), "c": (1.0, None), "d": (3.0, 4.0)}  # TTFT, deadline
    for rid, (ttft_s, deadline_s) in limits.items():
        told.tell(assign(rid, prompt=8).changed(slo=Slo(ttft_s=ttft_s), deadline_s=deadline_s))
    assert [told.run()[0][0] for _ in "abcd"] == ["c", "b", "d", "a"]


def test_short_prompts_overtake_a_started_one_if_there_is_memory():
    told = ageing(blocks=8, max_batch=3)
    told.tell(assign("a", prompt=20))
    assert told.run() == [("a", 0, 8)]
    told.tell(assign("b", prompt=3), assign("c", prompt=2), assign("d", prompt=2))
    assert told.run() == [("c", 0, 2), ("d", 0, 2)]  # no chunk holds them and the started one: that would go first
    told.tell(offer("x", prompt=12, src="d9"))
    assert told.run() == [("a", 8, 16)]  # b lacks memory


def test_prompts_are_listed_in_the_order_in_which_they_are_computed():
    told = ageing(blocks=60)
    told.tell(assign("a", prompt=20))
    told.run()
    told.tell(*[assign(rid, prompt=tokens) for rid, tokens in (("b", 15), ("c", 3), ("d", 2))])
    assert [request.lead.rid for request in told.core.prefill.in_order()] == ["d", "c", "a", "b"]


def test_no_more_legs_than_the_engine_takes_at_once(told):
    told.tell(*[assign(rid, prompt=1) for rid in "abc"])
    assert len(told.run()) == 2


def test_the_same_assignment_again_changes_nothing(told):
    told.tell(assign("a", prompt=4))
    assert not told.tell(assign("a", prompt=4)) and told.load().queued == 1


def test_an_attempt_that_was_given_up_is_not_begun_again(told):
    """Not even when its Failed was lost: the broker may have its first token, and another prefill write another one."""
    told.tell(assign("a", prompt=4))
    told.step()
    (failed,) = sent(told.tell(landed("a", 0), PeerDown("d1")), BROKER, Failed)
    assert sent(told.tell(assign("a", prompt=4))) == [failed] and failed.retry
    assert not told.tell(close("a"), assign("a", prompt=4, attempt=2)) and told.load().queued == 1


def test_of_attempts_that_were_given_up_the_oldest_are_forgotten(told):
    for rid in range(MOST_FAILED + 1):
        told.tell(assign(f"r{rid}", prompt=4))
        told.later()
        told.tell(RequestRejected(f"p:r{rid}:1", "odd"))
        told.step()
    assert not told.tell(assign("r0", prompt=4))
    (failed,) = sent(told.tell(assign("r1", prompt=4)), BROKER, Failed)
    assert (failed.rid, failed.why, failed.retry) == ("r1", "odd", False)


@pytest.mark.parametrize("prompt, changes", [(0, {}), (40, {}), (41, {}), (9, {"blocks": 2})])
def test_what_does_not_fit_fails_for_good(prompt, changes):
    told = working("p1", capacity=capacity(**changes))
    (failed,) = sent(told.tell(assign("a", prompt=prompt)), BROKER, Failed)
    assert not failed.retry and f"{prompt} tokens do not fit" in failed.why


@pytest.mark.parametrize("spans", [[("a", 0, 4)], [], [("a", 0, 8), ("b", 0, 1)]])
def test_a_step_that_ran_something_else_must_not_go_on(told, spans):
    told.tell(assign("a", prompt=8), assign("b", prompt=8))
    with pytest.raises(Broken, match="planned"):
        told.step(spans=spans)


def test_a_token_too_early_must_not_go_on(told):
    told.tell(assign("a", prompt=12))
    told.later()
    with pytest.raises(Broken, match="a token for p:a:1 at 8 of 12"):
        told.tell(StepDone((Span("p:a:1", 0, 8),), (Sampled("p:a:1", (7,), None),)))


def test_one_request_from_assign_to_landed(told):
    told.tell(assign("a", prompt=14))
    first = told.step()
    assert kinds(first) == ["AddRequest", "Staged > broker", "Offer > d1", "Step", "Export", "Chunk > d1"]
    assert sent(first, kind=Offer)[0].blocks == 4 and sent(first, kind=Staged)[0].stage == "prefill"
    last = told.step()
    assert kinds(last) == ["Step", "Tokens > broker", "Staged > broker", "Export", "Chunk > d1"]
    chunks = sent(first + last, kind=Chunk)
    assert [(each.index, each.start, each.stop, each.tokens) for each in chunks] == [(0, 0, 2, []), (1, 2, 4, [7])]
    assert not told.tell(grant("a")) and told.heartbeat().slots_used == 4
    assert kinds(told.tell(landed("a", 0), landed("a", 0), landed("a", 1))) == ["Free", "Free"]
    said = told.heartbeat()
    assert said.slots_used == 0 and [(hold.stage, hold.outputs) for hold in said.holds] == [("moving", 1)]
    assert not told.tell(close("a")) and not told.heartbeat().holds


def test_tokens_of_earlier_attempts_are_prefilled_and_still_count_as_output(told):
    told.tell(assign("a", prompt=4, output=[5, 6], max_tokens=4))
    actions = told.step()
    (engine_request,) = only(actions, AddRequest)
    assert (engine_request.request.tokens, engine_request.request.output_from) == ((1, 1, 1, 1, 5, 6), 4)
    assert sent(actions, kind=Tokens)[0].items[0].start == 2


@pytest.mark.parametrize("max_tokens, ends", [(1, {}), (8, {"a": "stop"})])
def test_a_first_token_that_ends_the_request_moves_no_more(told, max_tokens, ends):
    told.tell(assign("a", prompt=12, max_tokens=max_tokens))
    told.step()
    actions = told.step(**ends)
    (item,) = sent(actions, kind=Tokens)[0].items
    assert item.end.reason == ends.get("a", "length") and (item.start, item.ids) == (0, [7])
    assert not only(actions, Export)
    dropped = max_tokens > 1
    assert bool(sent(actions, "d1", Drop)) == dropped and bool(only(actions, Free)) == dropped
    said = told.heartbeat()
    assert said.slots_used == 0 and [hold.stage for hold in said.holds] == ["done"]


def test_the_last_token_that_fits_ends_a_request_though_the_engine_gives_no_reason(told):
    told.tell(assign("a", prompt=4, max_tokens=1))
    told.later()
    done = told.tell(StepDone((Span("p:a:1", 0, 4),), (Sampled("p:a:1", (7,), None),)))
    assert [item.end.reason for item in sent(done, kind=Tokens)[0].items] == ["length"]


def test_tokens_are_sent_again(told):
    told.tell(assign("a", prompt=2, output=[5]), assign("b", prompt=2, max_tokens=1))
    told.step()
    (again,) = sent(told.tell(resend("a", 0)), BROKER)
    assert (again.items[0].start, again.items[0].ids, again.items[0].end) == (0, [5, 7], None)
    (tokens,) = sent(told.tell(resend("b", 0)), BROKER)
    assert tokens.items[0].end.reason == "length"
    assert not told.tell(resend("a", 2), resend("a", 0, attempt=2), resend("nobody", 0))
    (end,) = sent(told.tell(resend("b", 1)), BROKER)
    assert not end.items[0].ids and end.items[0].end == tokens.items[0].end


def test_a_later_attempt_replaces_an_older_one(told):
    told.tell(assign("a", prompt=12), grant("a"))
    told.step()
    assert kinds(told.tell(assign("a", prompt=12, output=[5], attempt=2))) == ["CancelRequest", "Drop > d1", "Free"]
    assert told.load().queued == 1 and told.run() == [("a", 0, 8)]


def test_an_older_attempt_that_comes_late_is_closed_alone(told):
    told.tell(assign("a", prompt=8, attempt=2))
    assert not told.tell(close("a"))
    told.tell(assign("a", prompt=8))
    assert told.load().queued == 2
    told.tell(close("a"))
    assert [hold.attempt for hold in told.heartbeat().holds] == [2]


def test_a_prefill_leg_that_the_engine_preempts_begins_again(told):
    told.tell(assign("a", prompt=20))
    told.step()
    told.step(preempted="a", spans=[])
    assert told.load().queued_tokens == 20
    told.meet("d1")
    assert not only(told.step(), Export)  # its blocks are there already
    assert [(export.start, export.stop) for export in only(told.step(), Export)] == [(2, 4)]
