"""A worker that does both, changes its role, waits for predictions: both halves over one engine, one memory."""

from random import Random

import pytest

from tests.core.build import (
    Told,
    assign,
    capacity,
    chunk,
    grant,
    handle,
    identity,
    instance,
    kinds,
    landed,
    membership,
    offer,
    only,
    refuse,
    sent,
    view,
)
from tetri.core.actions import (
    AddRequest,
    AdmitRequest,
    Adopt,
    Adopted,
    Broken,
    CancelRequest,
    Export,
    Exported,
    Free,
    HoldRequest,
    LengthKnown,
    Predict,
    Publish,
    RequestRejected,
    Step,
)
from tetri.core.worker.worker import Worker
from tetri.cost import Cost
from tetri.engine_request import Sampled, Span, StepDone
from tetri.policy.rules import Rules
from tetri.request import LengthRange, Sampling
from tetri.wire.events import PeerUp
from tetri.wire.handover import Grant, Offer
from tetri.wire.messages import Close, Failed, Flip, Heartbeat, LoadReport, Staged

ROOMY = capacity(blocks=40, context=100, max_batch=4)
LONG = Sampling(max_tokens=20)
ELSEWHERE = [("p9", "decode")]  # whose earlier prompts are offered here; no connection stands to it


class Both(Told):
    """Copies KV at once. `step` runs what was planned: a token for each that decodes, the chunk as planned."""

    def result(self, action):
        match action:
            case Export(key, index, start, stop):
                return Exported(key, index, start, stop, handle(*range(start, stop), segment="s-m1"), 9)
            case Adopt(key, index):
                return Adopted(key, index)
        return super().result(action)

    def step(self, *, spans=None, decodes=None, preempted=(), reason=None):
        """Plan and run. `spans`: of prefill, when others than planned ran; `decodes`: keys that ran."""
        planned = self.later()
        assert isinstance(planned[-1], Step), kinds(planned)
        core = self.core
        spans = list(core.prefill.expected) if spans is None else spans
        ended = [span.key for span in spans if span.stop == core.prefill.requests[span.key].goal]
        running = [key for key in core.decode.batch.running if key not in preempted] if decodes is None else decodes
        tokens = [Sampled(key, (5,), None) for key in ended] + [Sampled(key, (6,), reason) for key in running]
        spans = [*spans, *(Span(key, 50, 51) for key in running)]
        allocated = tuple(core.decode.bare)
        return planned + self.tell(StepDone(tuple(spans), tuple(tokens), allocated, tuple(preempted)))


def start(role="mixed", others=(), **changes):
    told = Both(Worker(identity("m1", role, **{"capacity": ROOMY, "slots": 30, **changes}), Random(1), now=0.0))
    told.later()
    see(told, 1, *others)
    return told


def see(told, number, *others):
    """`others` are (iid, role)."""
    entries = [instance(iid, role) for iid, role in (*others, *ELSEWHERE)]
    told.tell(membership(number, instance("m1", told.core.role), *entries), *[PeerUp(iid) for iid, _ in others])


def decoding(told, rid="x", prompt=8, number=9, **changes):
    """A request from elsewhere runs here."""
    told.tell(offer(rid, prompt, offer=number, src="p9", sampling=LONG, **changes))
    key = f"d:{rid}:1:p9:{number}"
    told.step()
    told.tell(chunk(rid, 0, 0, -(-prompt // 4), token=5, offer=number, src="p9"))
    told.step()
    assert key in told.core.decode.batch.running
    return key


# ---------------------------------------------------------------- both at once


def test_a_request_may_stay_where_it_was_prefilled_and_no_message_leaves_for_it():
    told = start()
    told.tell(assign("a", prompt=12, max_tokens=3))
    actions = told.step() + told.step() + told.step()
    assert not sent(actions, "m1") and [
        engine_request.request.phase for engine_request in only(actions, AddRequest)
    ] == ["prefill", "decode"]
    actions += told.step(reason="length")
    assert [message.stage for message in sent(actions, kind=Staged)] == ["prefill", "moving", "waiting", "decode"]
    assert only(actions, AdmitRequest) and len(only(actions, Free)) == 2
    assert [hold.stage for hold in sent(told.later(0.1), kind=Heartbeat)[0].holds] == ["moving", "done"]
    told.tell(Close(rid="a", attempt=1))
    assert not told.core.prefill.requests and not told.core.decode.requests and told.core.ledger.free == 40


def test_another_attempt_that_begins_here_leaves_the_chunk_the_token_of_the_one_that_it_ends():
    """The broker's Close of the earlier attempt was lost, and it runs on while the next one is offered at home."""
    told = start()
    key = decoding(told, "a", prompt=4)
    told.tell(assign("a", prompt=16, attempt=2))
    planned = told.later()
    assert only(planned, CancelRequest) == [CancelRequest(key)] and told.core.prefill.expected == [Span("p:a:2", 0, 7)]
    told.tell(StepDone((Span("p:a:2", 0, 8),), (), tuple(told.core.decode.bare)))
    assert told.core.prefill.requests["p:a:2"].done == 8


def test_decodes_take_one_token_of_the_budget_each_and_the_chunk_the_rest():
    told = start(role="decode")
    decoding(told, "x", number=8)
    decoding(told, "y", number=9)
    told.tell(assign("a", prompt=20))
    told.later()
    assert [(span.start, span.stop) for span in told.core.prefill.expected] == [(0, 6)]


def test_while_prompts_wait_the_batch_stays_smaller_than_the_budget():
    told = start(role="decode", capacity=capacity(blocks=40, context=100, max_batch=4, chunk_tokens=2))
    decoding(told, "x", number=8)
    told.tell(assign("a", prompt=20), offer("y", 8, offer=9, src="p9", sampling=LONG))
    told.step()
    told.tell(chunk("y", 0, 0, 2, token=5, offer=9, src="p9"))
    told.step()
    assert len(told.core.decode.batch.running) == 1 and told.core.prefill.requests["p:a:1"].done == 2
    told.tell(Close(rid="a", attempt=1))
    told.later()
    assert len(told.core.decode.batch.running) == 2  # nobody waits any more


def test_decodes_that_fill_the_budget_leave_no_chunk():
    told = start(role="decode", capacity=capacity(blocks=40, context=100, max_batch=4, chunk_tokens=1))
    decoding(told)
    told.tell(assign("a", prompt=20))
    told.later()
    assert not told.core.prefill.expected


def test_a_prompt_that_waits_for_slots_is_held_while_others_step():
    told = start(role="prefill", others=[("d1", "decode")], slots=6)
    decoding(told)
    told.tell(assign("a", prompt=16))
    told.step()
    told.step()
    waits = told.step()
    assert only(waits, HoldRequest) == [HoldRequest("p:a:1", True)] and told.core.prefill.short
    assert not only(told.step(), HoldRequest)
    told.tell(grant("a"), landed("a", 0))
    assert only(told.step(), HoldRequest) == [HoldRequest("p:a:1", False)]


# ---------------------------------------------------------------- what the engine may do otherwise


def strained():
    """`x` runs, `a` is prefilled beside it: the next chunk is [7, 14)."""
    told = start(role="decode")
    key = decoding(told)
    told.tell(assign("a", prompt=30))
    told.step()
    return told, key


@pytest.mark.parametrize(
    "spans, preempted",
    [
        ([Span("p:a:1", 7, 15)], True),  # the place of one that was preempted
        ([Span("p:a:1", 7, 9)], True),
        ([], True),
        ([], False),
        ([Span("p:a:1", 7, 13)], False),
        ([Span("p:a:1", 6, 14)], True),
        ([Span("p:a:1", 7, 31)], True),
        ([Span("p:a:1", 7, 14), Span("p:b:1", 0, 1)], True),
    ],
)
def test_a_chunk_may_be_another_only_when_a_decode_was_preempted(spans, preempted):
    told, key = strained()
    told.tell(assign("b", prompt=30))
    allowed = preempted and spans in ([Span("p:a:1", 7, 15)], [Span("p:a:1", 7, 9)], [])
    if allowed:
        told.step(spans=spans, preempted=[key])
        assert told.core.prefill.requests["p:a:1"].done == (spans[0].stop if spans else 7)
    else:
        with pytest.raises(Broken, match="planned"):
            told.step(spans=spans, preempted=[key] if preempted else [])


def test_a_decode_that_is_computed_again_takes_its_share_of_the_budget():
    told, key = strained()
    told.step(spans=[Span("p:a:1", 7, 15)], preempted=[key])
    planned = told.later()
    assert isinstance(planned[-1], Step) and told.core.prefill.expected == [Span("p:a:1", 15, 23)]  # it does not run
    done = StepDone((Span(key, 0, 4), Span("p:a:1", 15, 19)))
    told.tell(done)  # half of it is computed again, and there is no token yet
    told.later()
    told.tell(StepDone((Span(key, 4, 10), Span("p:a:1", 19, 20)), (Sampled(key, (6,), None),)))
    assert not told.core.decode.batch.preempted and told.core.decode.requests[key].recomputed == 8


def test_none_of_a_chunk_need_run_while_memory_is_overdrawn():
    told = start(role="decode", capacity=capacity(blocks=8, context=32, chunk_tokens=3), reserve_share=1.0)
    decoding(told, prompt=11)
    told.tell(assign("a", prompt=16))
    while told.core.ledger.free >= 0:
        told.step()
    done = told.core.prefill.requests["p:a:1"].done
    told.step(spans=[])
    assert 0 < told.core.prefill.requests["p:a:1"].done == done < 16


def test_a_prefill_leg_that_the_engine_preempts_begins_again():
    told = start(role="prefill", others=[("d1", "decode")])
    told.tell(assign("a", prompt=20))
    told.step()
    told.later()
    told.tell(StepDone(preempted=("p:a:1",)))
    assert told.core.prefill.requests["p:a:1"].done == 0 and told.core.prefill.queue.tokens == 20
    told.tell(PeerUp("d1"))
    actions = told.step()
    assert not only(actions, Export)  # its blocks are there already
    assert [(export.start, export.stop) for export in only(told.step(), Export)] == [(2, 4)]


def test_a_decode_that_the_engine_does_not_admit_leaves_its_place_to_the_chunk():
    told = start(role="decode")
    told.tell(offer("x", 8, offer=9, src="p9", sampling=LONG), assign("a", prompt=20))
    told.step()
    told.tell(chunk("x", 0, 0, 2, token=5, offer=9, src="p9"))
    assert only(told.later(), AdmitRequest) and told.core.prefill.expected == [Span("p:a:1", 8, 15)]
    told.tell(RequestRejected("d:x:1:p9:9", "odd"))
    told.tell(StepDone((Span("p:a:1", 8, 16),)))
    assert told.core.prefill.requests["p:a:1"].done == 16


# ---------------------------------------------------------------- roles


def test_a_change_of_role_is_told_at_once():
    told = start(role="prefill")
    actions = told.tell(Flip(role="decode", number=8))
    (said,) = sent(actions, kind=Heartbeat)
    (published,) = only(actions, Publish)
    assert said.role == published.message.role == told.core.role == "decode" and said.flip == 8
    assert isinstance(published.message, LoadReport)
    assert sent(told.tell(Flip(role="decode", number=8)), kind=Heartbeat)  # perhaps that was missed
    (said,) = sent(told.tell(Flip(role="king", number=9)), kind=Heartbeat)
    assert (said.role, said.flip) == ("decode", 8)


def test_what_is_here_is_finished_whatever_the_role():
    told = start(role="prefill", others=[("d1", "decode")])
    told.tell(assign("a", prompt=12))
    told.step()
    told.tell(Flip(role="decode", number=8), assign("b", prompt=4))
    assert {span.key for span in told.core.prefill.expected} == set()
    told.later()
    assert [span.key for span in told.core.prefill.expected] == ["p:a:1", "p:b:1"]


def test_prompts_that_nobody_else_decodes_stay_when_their_instance_turns_to_decode():
    told = start(role="prefill")
    told.tell(assign("a", prompt=8))
    told.step()
    assert "p:a:1" in told.core.dispatcher.unplaceable
    actions = told.tell(Flip(role="decode", number=8))
    assert told.core.prefill.requests["p:a:1"].flow.target == "m1" and only(actions, AddRequest)
    assert not sent(actions, "m1") and not told.core.dispatcher.unplaceable


def test_loads_are_published_again_and_again():
    cost = Cost(prefill=((0.0, 0.0), (10.0, 1.0)), decode=((1.0, 0.5),))
    told = start(role="decode", load_s=0.25, cost=cost)
    key = decoding(told, length=LengthRange(low=0, high=10))
    told.tell(assign("a", prompt=20))
    told.later()
    told.now += 0.2
    told.tell(StepDone((Span(key, 9, 10), Span("p:a:1", 0, 7)), (Sampled(key, (6,), None),)))
    (report,) = [action.message for action in only(told.later(0.05), Publish)]
    load = report.load
    assert (load.queued, load.queued_tokens, load.queued_s) == (1, 13, pytest.approx(1.3))
    assert (load.waiting, load.landed, load.running, load.heavy, load.growth_blocks) == (1, 0, 1, 0, 2 + 2)
    assert (load.decode_s, load.busy) == (pytest.approx(3.5), pytest.approx(0.8))  # 6 and 8 tokens
    assert only(told.later(0.25), Publish)


def test_a_load_tells_those_with_all_their_kv_from_those_that_wait_for_it():
    told = start(role="decode")
    told.tell(offer("x", prompt=8, offer=9, src="p9", sampling=LONG), offer("y", prompt=8, offer=8, src="p9"))
    told.step()
    told.tell(chunk("x", 0, 0, 2, token=5, offer=9, src="p9"))
    load = told.core.reporter.load()
    assert (load.waiting, load.landed, load.running) == (2, 1, 0)


# ---------------------------------------------------------------- predictions


def test_a_request_is_offered_when_its_length_is_known_and_none_overtakes_it():
    told = start(role="prefill", others=[("d1", "decode")], rules=Rules(length="noisy", decode_route="first_fit"))
    actions = told.tell(assign("a", prompt=4), assign("b", prompt=4, output=[1] * 3))
    assert [(ask.key, ask.prompt) for ask in only(actions, Predict)] == [("p:a:1", (1,) * 4), ("p:b:1", (1,) * 4)]
    assert not sent(told.later(), kind=Offer)
    assert not told.tell(LengthKnown("p:b:1", LengthRange(low=0, high=2)), LengthKnown("p:gone:1", None))
    first, second = sent(told.tell(LengthKnown("p:a:1", None)), "d1", Offer)
    assert (first.rid, first.length, second.rid) == ("a", None, "b")
    assert second.length == LengthRange(low=2, high=4)  # three tokens are there already


def unanswered(**changes):
    """Two prompts are computed; nobody says how long their outputs will be."""
    rules = Rules(length="noisy", decode_route="first_fit", length_wait_s=1.5)
    told = start(role="prefill", others=[("d1", "decode")], rules=rules, view_s=60.0, **changes)
    told.tell(assign("a", prompt=4), assign("b", prompt=4))
    told.later(10.0)  # both start now: before, nobody waited for the predictions
    told.core.stepping = False
    return told


def test_a_prediction_that_does_not_come_is_waited_for_only_so_long():
    told = unanswered()
    assert not sent(told.later(1.4), kind=Offer) and told.core.prefill.lengths.late == 0
    told.core.stepping = False
    offers = sent(told.later(0.2), "d1", Offer)
    assert [(offer.rid, offer.length) for offer in offers] == [("a", None), ("b", None)]
    assert told.core.prefill.lengths.late == 2
    assert not told.tell(LengthKnown("p:a:1", LengthRange(low=0, high=2)))  # it is too late
    assert told.core.prefill.requests["p:a:1"].length is None


def test_nobody_waits_for_a_prediction_any_more_when_it_is_there_or_of_no_use():
    told = unanswered()
    told.tell(LengthKnown("p:b:1", LengthRange(low=0, high=2)), Close(rid="a", attempt=1))
    told.core.stepping = False
    told.later(5.0)
    assert told.core.prefill.lengths.late == 0 and told.core.prefill.requests["p:b:1"].length is not None


def test_a_request_that_is_not_decoded_waits_for_no_prediction():
    told = start(role="prefill", rules=Rules(length="noisy"))
    told.tell(assign("a", prompt=4, max_tokens=1))
    told.later()
    assert "p:a:1" not in told.core.timers


# ---------------------------------------------------------------- memory that both want

TIGHT = capacity(blocks=12, context=48)


def blocked(others=(("d1", "decode"),)):
    """`a` has twelve blocks' worth of prompt here, its first chunk fills the store, and nobody takes it."""
    told = start(role="mixed", others=others, capacity=TIGHT, slots=6, reserve_share=1.0)
    told.tell(assign("a", prompt=32, max_tokens=4))
    told.step()
    return told


def test_a_prompt_that_nobody_takes_gives_its_memory_to_a_request_to_be_decoded():
    told = blocked()
    number = told.core.prefill.requests["p:a:1"].flow.offer
    told.tell(refuse("a", number))
    told.later()
    assert told.core.prefill.blocked() is not None and told.core.reporter.load().free_blocks == 12
    actions = told.tell(offer("x", prompt=32, offer=9, src="p9"))
    assert kinds(actions) == ["CancelRequest", "Free", "AddRequest", "Grant > p9"]
    request = told.core.prefill.requests["p:a:1"]
    assert (request.done, request.turn, request.running, request.flow.exported) == (0, 0, False, 0)
    assert not told.core.prefill.expected and told.core.prefill.slots_used == 0
    told.tell(Close(rid="x", attempt=1))
    assert kinds(told.step())[:2] == ["AddRequest", "Staged > broker"]  # it begins again


@pytest.mark.parametrize("rid, yields", [("Z", True), ("b", False)])
def test_of_two_that_ask_each_others_instances_the_lower_id_wins(rid, yields):
    told = blocked()
    told.later()
    (answer,) = sent(told.tell(offer(rid, prompt=32, offer=9, src="p9")), "p9")
    assert isinstance(answer, Grant) == yields
    assert (told.core.prefill.requests["p:a:1"].flow.offer is None) == yields


def test_memory_is_not_given_up_when_that_is_not_enough_or_to_the_same_request():
    told = blocked()
    told.later()
    assert not told.core.prefill.free_memory("Z", 13) and not told.core.prefill.free_memory("a", 8)


def test_a_prompt_that_was_taken_gives_nothing_up():
    told = blocked()
    told.later()
    told.tell(grant("a", told.core.prefill.requests["p:a:1"].flow.offer))
    assert kinds(told.tell(offer("Z", prompt=32, offer=9, src="p9"))) == ["Refuse > p9"]


def test_no_memory_is_given_up_while_the_engine_computes():
    told = blocked()
    told.later()
    told.core.stepping = True
    assert not told.core._free_memory("Z", 8)
    told.core.stepping = False


def test_kv_that_was_exported_before_it_began_again_is_freed():
    told = blocked()
    told.later()
    told.tell(offer("Z", prompt=32, offer=9, src="p9"))
    told.core.prefill.kv_send.used += 2  # an export that took its time
    late = Exported("p:a:1", 0, 0, 2, handle(0, 1, segment="s-m1"), 9)
    assert only(told.tell(late), Free) and told.core.prefill.slots_used == 0


def stuck():
    """`x` runs and has lost its memory; `a` holds blocks, waits for slots, and is on offer nowhere."""
    told = start(role="mixed", others=[("d1", "decode")], capacity=TIGHT, slots=6, reserve_share=1.0)
    key = decoding(told, prompt=12)
    told.tell(assign("a", prompt=28, max_tokens=4))
    told.step()
    told.step()
    request = told.core.prefill.requests["p:a:1"]
    told.later()
    told.core.dispatcher.refused(request, "full")
    told.tell(StepDone(preempted=(key,)))
    return told, key


def test_decodes_that_cannot_go_on_get_the_memory_of_a_prompt_that_cannot_either():
    told, key = stuck()
    assert told.core.decode.batch.stuck() and not told.core.idle
    actions = told.later()
    assert only(actions, CancelRequest) == [CancelRequest("p:a:1")] and isinstance(actions[-1], Step)
    assert told.core.ledger.free == 12 - 4
    told.tell(StepDone((Span(key, 0, 14),), (Sampled(key, (6,), None),)))


def test_a_prompt_that_only_its_own_instance_could_decode_but_not_beside_it_goes_elsewhere():
    told = start(others=[("p1", "prefill")], capacity=TIGHT, slots=6, view_s=2.0)
    told.tell(assign("a", prompt=32, max_tokens=4))
    told.step()
    assert "p:a:1" in told.core.dispatcher.unplaceable
    assert not sent(told.later(1.9), kind=Failed)
    (failed,) = sent(told.later(0.2), kind=Failed)
    assert failed.retry and "not beside its own prefill" in failed.why


@pytest.mark.parametrize("others", [(), [("d1", "decode")], None])
def test_with_nobody_else_to_prefill_it_such_a_prompt_waits_for_whoever_comes(others):
    """Attempt after attempt here would use them all up long before the patience."""
    told = start(capacity=TIGHT, slots=6, view_s=2.0, patience_s=10.0)
    told.tell(assign("a", prompt=32, max_tokens=4))
    told.step()
    assert not sent(told.later(9.0), kind=Failed)
    if others is None:
        told.core.stepping = False
        (failed,) = sent(told.later(1.5), kind=Failed)
        assert not failed.retry and "8 KV blocks" in failed.why and "transfer.slab_blocks to 11" in failed.why
        return
    if others:
        see(told, 2, *others)
        assert told.core.prefill.requests["p:a:1"].flow.target == "d1"
        return
    see(told, 2, ("p1", "prefill"))
    told.core.stepping = False
    (failed,) = sent(told.later(0.2), kind=Failed)
    assert failed.retry


@pytest.mark.parametrize("behind", [assign("b", prompt=8, max_tokens=4), assign("b", prompt=32, max_tokens=1), None])
def test_such_a_prompt_does_not_hold_up_those_that_can_go_on(behind):
    """It has other attempts, behind them."""
    told = start(capacity=TIGHT, slots=6, view_s=2.0, patience_s=10.0)
    told.tell(assign("a", prompt=32, max_tokens=4), behind or assign("b", prompt=32, max_tokens=4))
    told.step()
    assert not told.later(1.9)[1:] and told.core.prefill.blocked() is not None
    told.core.stepping = False
    failed = sent(told.later(0.2), kind=Failed)
    assert [(each.rid, each.retry) for each in failed] == [("a", True)] * (behind is not None)
    told.later()  # now the slots are free
    assert (told.core.prefill.expected[:1] == [Span("p:b:1", 0, 8)]) == (behind is not None)


def test_when_it_refuses_itself_others_are_asked():
    told = start(others=[("d1", "decode")], capacity=TIGHT, reserve_share=0.2)
    told.tell(view(1, d1=0), assign("a", prompt=16, max_tokens=8), assign("b", prompt=16, max_tokens=8))
    for _ in range(4):
        told.step()
    requests = told.core.prefill.requests
    assert (requests["p:a:1"].flow.target, requests["p:b:1"].flow.target) == (
        "m1",
        "",
    )  # reservations take their share only
    assert [each.rid for each in sent(told.tell(view(2, d1=10)), "d1", Offer)] == ["b"]
