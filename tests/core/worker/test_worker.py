"""The worker's core as a whole: registering, rosters, beats, when it steps; and both phases over one engine and one
memory, whatever its role."""

import pytest

from tests.core.build import assign, capacity, chunk, close, drop, flip, grant, instance, membership, offer, refuse
from tests.core.driver import working
from tests.core.reading import added, kinds, only, sent
from tetri.core import actions as say
from tetri.core.actions import BROKER, Broken
from tetri.core.worker.unlisted import MOST_UNLISTED
from tetri.engine_request import StepDone
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.handover import Grant, Offer
from tetri.wire.messages import Failed, Heartbeat, LoadReport, Ready, Staged, Tokens

AT_ONCE = float("-inf")
ROOMY = {"capacity": capacity(blocks=40, context=100, max_batch=4), "slots": 30}


@pytest.fixture
def told():
    made = working("p1")
    made.later()
    return made


# ---------------------------------------------------------------- registering


def test_it_registers_when_the_broker_is_there_and_again_when_it_hears_no_roster(told):
    (found,) = sent(told.tell(PeerUp(BROKER)), BROKER, Ready)
    assert (found.instance.iid, found.instance.role, found.load.free_blocks) == ("p1", "prefill", 10)
    assert not sent(told.later(1.9), kind=Ready)
    assert sent(told.later(0.2), kind=Ready)
    assert not told.tell(PeerDown(BROKER))


def test_it_registers_at_once_when_a_roster_leaves_it_out(told):
    told.tell(membership(8, instance("p1", "prefill", incarnation=9)))
    assert sent(told.later(), kind=Ready)
    told.tell(membership(9, instance("p1", "prefill")))
    assert not sent(told.later(0.1), kind=Ready)


def test_rosters_connect_and_disconnect(told):
    told.tell(membership(7))
    assert kinds(told.tell(membership(8, instance("p1", "prefill"), instance("d1", "decode")))) == ["Connect"]
    assert not told.tell(membership(8), membership(0))  # older ones
    assert kinds(told.tell(membership(9, instance("d1", "decode", incarnation=2)))) == ["Disconnect", "Connect"]
    assert kinds(told.tell(membership(1, epoch=2))) == ["Disconnect"]


def test_who_misses_a_change_registers_again(told):
    me, d1, d2 = instance("p1", "prefill"), instance("d1", "decode"), instance("d2", "decode")
    told.tell(membership(7, me))
    assert kinds(told.tell(membership(8, d1, since=7))) == ["Connect"] and not sent(told.later(), kind=Ready)
    assert not told.tell(membership(8, since=8)) and not sent(told.later(), kind=Ready)  # nothing has changed
    assert not told.tell(membership(10, d2, since=9)) and sent(told.later(), kind=Ready)
    assert not told.tell(membership(11, since=10, gone=["d1"])) and sent(told.later(), kind=Ready)
    assert kinds(told.tell(membership(11, me, d2))) == ["Disconnect", "Connect"] and not sent(told.later(), kind=Ready)
    assert kinds(told.tell(membership(12, since=11, gone=["d2"]))) == ["Disconnect"]
    told.tell(membership(1, d1, since=0, epoch=2))  # of another broker, which it has no whole Membership of
    assert sent(told.later(), kind=Ready)
    told.tell(membership(1, me, epoch=2))
    told.tell(membership(2, since=1, gone=["p1"], epoch=2))
    assert sent(told.later(), kind=Ready)


# ---------------------------------------------------------------- beats and rest


def test_beats_come_regularly_and_list_what_is_held(told):
    told.tell(assign("r", prompt=12))
    first = told.heartbeat()
    told.step()
    second = told.heartbeat()
    assert [(hold.rid, hold.stage) for hold in (*first.holds, *second.holds)] == [("r", "queued"), ("r", "prefill")]
    assert (second.load.free_blocks, second.load.queued, second.load.queued_tokens) == (7, 1, 4)
    assert (first.slots_used, second.slots_used) == (0, 2)


def test_heartbeats_name_the_last_membership_that_was_read_whether_it_was_of_use_or_not(told):
    def after(*messages):
        told.tell(*messages)
        beat = told.heartbeat()
        return beat.epoch, beat.read

    assert after(membership(8, serial=20), membership(8, since=8, serial=21)) == (1, 21)
    assert after(membership(10, since=9, serial=23)) == (1, 23)  # a change of one that was lost
    assert after(membership(8, since=8, serial=22)) == (1, 23)  # an older one
    assert after(membership(3, serial=3, epoch=5)) == (5, 3)  # another broker's


def test_it_rests_when_there_is_nothing_to_do_and_wakes_with_any_event_but_a_view(told):
    assert told.core.deadline() == pytest.approx(0.1)
    assert not told.view(d9=9) and told.core.deadline() == pytest.approx(0.1)
    told.tell(membership(9))
    assert told.core.deadline() == AT_ONCE
    told.later()
    assert told.core.deadline() == pytest.approx(0.1)


def test_it_does_nothing_but_wait_while_the_engine_computes(told):
    told.tell(assign("r", prompt=8))
    assert kinds(told.later())[-1] == "Step" and told.core.deadline() is None
    assert not only(told.later(0.2), say.Step)


def test_it_rests_when_a_step_achieved_nothing(told):
    told.tell(offer("r", prompt=8, src="d9"))
    told.later()
    told.tell(StepDone())  # no blocks were free
    assert told.core.deadline() > 0.0
    told.most = None
    told.tell(PeerUp("d9"))
    told.step()
    assert told.core.deadline() == AT_ONCE


# ---------------------------------------------------------------- early messages


@pytest.mark.parametrize("unknown", [{"src": "p3"}, {"incarnation": 2}])
def test_what_an_instance_says_that_no_roster_has_told_of_waits_for_the_next(unknown):
    """Where it is, and how its slab can be read, is not known yet: no answer would reach it."""
    told = working("d1", "p1")
    assert not told.tell(offer("r", 8, **unknown), chunk("r", 0, 0, 1, **unknown), offer("x", 4, **unknown))
    assert not told.tell(drop("x", **unknown)) and not sent(told.meet("p1"))
    actions = told.meet(*(instance(iid, "prefill", unknown.get("incarnation", 1)) for iid in ("p1", "p3")))
    assert [type(each) for each in sent(actions) if each.src == "d1"][:2] == [Grant, Grant]
    assert told.load().waiting == 1  # the drop was heard too, and after its offer
    assert "Adopt" in kinds(told.step())  # and so was the chunk


def test_of_too_many_early_messages_the_oldest_are_forgotten():
    told = working("d1")
    for number in range(MOST_UNLISTED + 1):
        told.tell(offer(f"r{number}", prompt=4, src="p3", offer=number + 1))
    answers = sent(told.meet(apart=["p3"]), "p3")
    assert len(answers) == MOST_UNLISTED and answers[0].rid == "r1"
    assert not sent(told.meet(apart=["p3"]), "p3")


# ---------------------------------------------------------------- what must not be


def test_an_engine_that_holds_more_than_it_should_must_not_go_on(told):
    told.tell(assign("r", prompt=8))
    told.later()
    with pytest.raises(Broken, match="the engine holds 3 blocks"):
        told.tell(StepDone(held=(("p:r:1", 3),)))


def test_nonsense_is_refused(told):
    with pytest.raises(Broken, match="worker does not handle"):
        told.tell(object())


# ---------------------------------------------------------------- both at once


def test_a_request_may_stay_where_it_was_prefilled_and_no_message_leaves_for_it():
    told = working("m1", **ROOMY)
    told.tell(assign("a", prompt=12, max_tokens=3))
    actions = told.step() + told.step() + told.step()
    assert not sent(actions, "m1") and added(actions) == ["p:a:1"]
    assert only(actions, say.StayRequest) == [say.StayRequest("p:a:1", "d:a:1:m1:1")]
    actions += told.step()
    assert [message.stage for message in sent(actions, kind=Staged)] == ["prefill", "waiting", "decode"]
    assert (kinds(actions).count("AdmitRequest"), kinds(actions).count("Export")) == (1, 0)
    assert sent(actions, kind=Tokens)[-1].items[0].end
    assert [stage for _, stage, _ in told.holds()] == ["moving", "done"]
    told.tell(close("a"))
    assert told.holds() == [] and told.load().free_blocks == 40


def test_messages_to_itself_nest_no_deeper_the_more_there_are():
    """Thousands of short prompts planned at once: each is offered, granted, announced and landed here."""
    many = 5_000
    large = capacity(blocks=2 * many, context=100, chunk_tokens=many, max_batch=2 * many)
    told = working("m1", capacity=large, slots=2 * many)
    for number in range(many):
        told.core.handle(assign(f"r{number}", prompt=1, max_tokens=2), 0.0)
    planned = told.later()
    assert kinds(planned).count("StayRequest") == many and not sent(planned, "m1")
    actions = told.step()
    assert not only(actions, say.Export)
    assert [message.stage for message in sent(told.later(), kind=Staged)] == ["decode"] * many


def test_another_attempt_that_begins_here_leaves_the_chunk_the_token_of_the_one_that_it_ends():
    """The broker's Close of the earlier attempt was lost, and it runs on while the next one is offered at home."""
    told = working("m1", **ROOMY).running("a", prompt=4)
    told.tell(assign("a", prompt=16, attempt=2))
    assert only(told.later(), say.CancelRequest) == [say.CancelRequest("d:a:1:d9:1")]
    assert told.run() == [("a", 0, 8)] and told.load().queued_tokens == 8


def test_what_a_message_to_itself_takes_back_was_added_before():
    """A Membership without d1 makes m1 offer attempt 2 to itself, and lets in an Offer of attempt 1 that has waited."""
    told = working("m1", "d1", **ROOMY)
    told.tell(assign("a", prompt=4, attempt=2))
    told.step()
    assert told.asked["a"][0] == "d1"
    told.tell(offer("a", prompt=4, src="p2"))
    actions = told.meet("p2", apart=())
    assert added(actions) == ["d:a:1:p2:1", "d:a:2:m1:2"]
    assert kinds(only(actions, say.AddRequest | say.CancelRequest)) == ["AddRequest", "CancelRequest", "AddRequest"]
    told.step()


def test_decodes_take_one_token_of_the_budget_each_and_the_chunk_the_rest():
    told = working("d1", **ROOMY).running("x", "y", src="d9")
    told.tell(assign("a", prompt=20))
    assert told.run() == [("a", 0, 6)] and told.load().running == 2


@pytest.mark.parametrize("budget, chunk_, batch", [(2, [("a", 1, 2)], 1), (1, [], 1)])
def test_while_prompts_wait_the_batch_stays_smaller_than_the_budget(budget, chunk_, batch):
    """But for one that runs already: it may leave no chunk."""
    small = capacity(blocks=40, context=100, max_batch=4, chunk_tokens=budget)
    told = working("d1", capacity=small, slots=30).running("x", src="d9")
    told.tell(assign("a", prompt=20))
    told.land("y", number=9, src="d9")
    assert told.run() == chunk_ and told.load().running == batch
    told.tell(close("a"))
    told.later()
    assert told.load().running == 2  # nobody waits any more


def test_a_prompt_that_waits_for_slots_is_held_while_others_step():
    told = working("p1", "d1", capacity=ROOMY["capacity"], slots=6).running("x", max_tokens=20)
    told.tell(assign("a", prompt=16))
    told.step()
    told.step()
    holds = [only(told.step(), say.HoldRequest) for _ in range(2)]
    assert holds == [[say.HoldRequest("p:a:1", True)], []]
    told.answer("a", grant)
    told.take("a")
    assert only(told.step(), say.HoldRequest) == [say.HoldRequest("p:a:1", False)]


# ---------------------------------------------------------------- what the engine may do otherwise


def strained(**changes):
    """`x` runs, `a` is prefilled beside it: the next chunk is [7, 14)."""
    told = working("d1", **{**ROOMY, **changes}).running("x", src="d9", max_tokens=20)
    told.tell(assign("a", prompt=30))
    told.step()
    return told


def left(told):
    return told.load().queued_tokens


@pytest.mark.parametrize("span, tokens", [([("a", 7, 15)], 15), ([("a", 7, 9)], 21), ([], 23)])
def test_a_chunk_may_be_another_when_a_decode_was_preempted(span, tokens):
    """It may have the place of the preempted one, or be smaller."""
    told = strained()
    told.step(spans=span, preempted="x")
    assert left(told) == tokens


@pytest.mark.parametrize("spans", [[("a", 6, 14)], [("a", 7, 31)], [("a", 7, 14), ("b", 0, 1)]])
def test_but_it_must_be_one_of_what_was_planned(spans):
    told = strained()
    told.tell(assign("b", prompt=30))
    with pytest.raises(Broken, match="planned|the engine holds"):
        told.step(spans=spans, preempted="x")


def test_a_decode_that_is_computed_again_takes_its_share_of_the_budget():
    told = strained()
    told.step(spans=[("a", 7, 15)], preempted="x")
    told.step(spans=[("a", 15, 23)], out="x")  # it does not run, and takes nothing
    told.step(spans=[("a", 23, 27)], part={"x": 4})  # half of it, and there is no token yet
    told.step(spans=[("a", 27, 28)])
    assert left(told) == 2 and told.load().running == 1
    ends = [item.end for message in sent(told.step(x="stop"), kind=Tokens) for item in message.items if item.end]
    assert [end.receipt.recomputed for end in ends] == [8]


def test_none_of_a_chunk_need_run_while_memory_is_overdrawn():
    told = working("d1", role="prefill", capacity=capacity(blocks=8, context=32, chunk_tokens=3), reserve_share=1.0)
    told.running("x", prompt=11, src="d9", max_tokens=20)
    told.tell(assign("a", prompt=16))
    while told.load().free_blocks >= 0:
        told.step()
    before = left(told)
    told.step(spans=[])
    assert 0 < left(told) == before < 16


@pytest.mark.parametrize("rid", ["x", "a"])
def test_one_that_the_engine_does_not_take_leaves_its_place_to_the_others(rid):
    told = working("d1", "d2", **ROOMY)
    told.land("x", src="d9")
    told.tell(assign("a", prompt=4), assign("b", prompt=20))
    assert only(told.later(), say.AdmitRequest) and told.chunk() == [("a", 0, 4), ("b", 0, 3)]
    actions = told.tell(say.RequestRejected(told.key(rid), "odd"))
    told_of = ["Refuse > d9", "CancelRequest"] if rid == "x" else ["CancelRequest", "Drop > d2", "Failed > broker"]
    assert kinds(actions) == told_of
    assert [(failed.why, failed.retry) for failed in sent(actions, BROKER)] == [("odd", False)] * (rid == "a")
    assert told.run() == ([("a", 0, 4), ("b", 0, 4)] if rid == "x" else [("b", 0, 7)])


# ---------------------------------------------------------------- roles and loads


def test_a_change_of_role_is_told_at_once(told):
    for role, number, becomes in (("decode", 8, 8), ("decode", 8, 8), ("king", 9, 8)):  # perhaps it was missed
        actions = told.tell(flip(role, number))
        (said,), (published,) = sent(actions, kind=Heartbeat), only(actions, say.Publish)
        assert isinstance(published.message, LoadReport)
        assert said.role == published.message.role == "decode" and said.flip == becomes


def test_prompts_that_nobody_else_decodes_stay_when_their_instance_turns_to_decode():
    told = working("p1", **ROOMY)
    told.tell(assign("a", prompt=8))
    told.step()
    actions = told.tell(flip("decode"))
    assert added(actions) == ["d:a:1:p1:1"] and not sent(actions, "p1")


# ---------------------------------------------------------------- memory that both want


def blocked():
    """`a` has eight of twelve blocks here, its first chunk fills the store, and nobody takes it, nor does this instance
    by now."""
    told = working("m1", "d1", role="prefill", capacity=capacity(blocks=12, context=48), slots=6, reserve_share=1.0)
    told.tell(assign("a", prompt=32, max_tokens=4))
    told.step()
    return told


def test_a_prompt_that_nobody_takes_gives_its_memory_to_a_request_to_be_decoded():
    told = blocked()
    told.answer("a", refuse)
    told.later()
    assert told.load().free_blocks == 12  # as if it were free
    assert kinds(told.tell(offer("x", prompt=32, src="d9"))) == ["CancelRequest", "Free", "AddRequest", "Grant > d9"]
    assert told.load().queued_tokens == 32
    told.tell(close("x"))
    assert kinds(told.step())[:2] == ["AddRequest", "Staged > broker"]  # it begins again


@pytest.mark.parametrize(
    "ask, answer",
    [
        (offer("Z", 32, src="d9"), "Grant"),  # of two that ask each other's instances the lower id wins
        (offer("b", 32, src="d9"), "Defer"),
        (offer("Z", 44, max_tokens=2, src="d9"), "Grant"),
        (offer("Z", 48, max_tokens=0, src="d9"), "Refuse"),  # more than there is
        (offer("a", 44, max_tokens=2, src="d9"), "Defer"),  # it would be for itself
    ],
)
@pytest.mark.parametrize("granted", [False, True])
def test_memory_is_given_up_by_one_that_nobody_has_taken_to_a_lower_id(ask, answer, granted):
    told = blocked()
    told.later()
    if granted:
        told.answer("a", grant)
        answer = "Defer" if answer == "Grant" else answer
    assert kinds(told.tell(ask))[-1] == f"{answer} > d9"
    assert told.load().queued_tokens == (32 if answer == "Grant" else 24)  # it begins again


def test_a_prompt_that_waits_for_slots_of_a_later_one_gives_it_its_memory():
    """Both are on offer to their own instance, which is mixed and alone: `b` has the slots, `a` the memory."""
    told = working("m1", role="mixed", capacity=capacity(blocks=12, context=48), slots=9, reserve_share=0.5)
    told.tell(offer("y", prompt=16, src="d9"), assign("b", prompt=8, max_tokens=4, siblings=["b1", "b2", "b3"]))
    while told.run():
        pass
    told.tell(assign("a", prompt=20, max_tokens=4, siblings=["a1"]))
    while told.run():
        pass
    told.tell(close("y"))
    assert say.CancelRequest("p:a:1") in told.later() and told.key("b").startswith("d:")


def test_memory_is_not_given_up_when_that_is_not_enough():
    told = blocked()
    told.land("y", prompt=4)
    told.later()
    assert kinds(told.tell(offer("Z", 44, max_tokens=2, src="d9", offer=2))) == ["Defer > d9"]
    assert told.load().queued_tokens == 24


def test_no_memory_is_given_up_while_the_engine_computes_but_after_that():
    told = blocked()
    told.tell(offer("y", prompt=4, src="d9"))
    assert only(told.later(), say.Step)
    assert kinds(told.tell(offer("Z", prompt=32, src="d9", offer=2))) == ["Defer > d9"]
    told.step()
    assert kinds(told.later())[:4] == ["CancelRequest", "Drop > d1", "Free", "AddRequest"]


@pytest.mark.parametrize("rid, gets_it", [("Z", True), ("b", False)])
def test_a_deferred_offer_gets_the_memory_of_a_prompt_that_cannot_go_on_from_now_on(rid, gets_it):
    """Nothing else may come that would make the instance look again."""
    told = blocked()
    assert kinds(told.tell(offer(rid, prompt=32, src="d9"))) == ["Defer > d9"]
    assert ("Grant > d9" in kinds(told.later())) == gets_it


def test_a_canary_that_its_own_instance_refuses_is_in_no_step():
    """A later attempt is here: the refusal comes while its only chunk is planned."""
    told = working("m1", **ROOMY)
    told.tell(offer("c", prompt=1, attempt=2, src="d9"))
    told.tell(assign("c", prompt=1, max_tokens=2, ignore_eos=True, pinned="m1"))
    assert [each.rid for each in sent(told.later(), kind=Failed)] == ["c"] and told.chunk() == []
    told.step()


def test_a_canary_of_its_own_instance_is_decoded_though_all_memory_is_wanted():
    told = working("m1", role="mixed", capacity=capacity(blocks=12, context=60), slots=30)
    told.tell(*(offer(rid, 44, offer=5 + n, max_tokens=2, src="d9") for n, rid in enumerate("xyz")))
    told.tell(assign("c", prompt=1, max_tokens=2, ignore_eos=True, pinned="m1"))
    actions = told.step() + told.step()
    assert sent(actions, kind=Tokens)[-1].items[0].end and not only(actions, say.Export)


def test_kv_that_is_exported_after_it_began_again_is_freed():
    told = working("m1", "d1", capacity=capacity(blocks=12, context=48), slots=6, reserve_share=1.0)
    told.tell(assign("a", prompt=32, max_tokens=4))
    told.exports = False
    (export,) = only(told.step(), say.Export)
    told.later()
    told.tell(offer("Z", prompt=32, src="d9"))
    assert told.heartbeat().slots_used == 2
    told.exports = True
    assert only(told.tell(told.result(export)), say.Free) and told.heartbeat().slots_used == 0


def test_decodes_that_cannot_go_on_get_the_memory_of_a_prompt_that_cannot_either():
    """`x` runs and has lost its memory; `a` holds blocks, waits for slots, and is on offer nowhere."""
    told = working("m1", "d1", role="prefill", capacity=capacity(blocks=12, context=48), slots=6, reserve_share=1.0)
    told.running("x", prompt=12, max_tokens=20)
    told.tell(assign("a", prompt=28, max_tokens=4))
    told.step()
    told.step()
    told.later()
    told.answer("a", refuse)
    told.step(preempted="x")
    assert told.core.deadline() == AT_ONCE
    actions = told.later()
    assert only(actions, say.CancelRequest) == [say.CancelRequest("p:a:1")] and isinstance(actions[-1], say.Step)
    assert told.load().free_blocks == 12 - 4 and not sent(actions, kind=Offer)
