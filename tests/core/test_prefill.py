"""The prefill half, told through the worker's core: chunks, offers, first tokens, KV that leaves, letting go."""

from random import Random

import pytest

from tests.core.build import (
    Told,
    assign,
    capacity,
    fingerprint,
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
from tetri.core.actions import BROKER, AddRequest, Broken, CancelRequest, Export, Exported, Free, RequestRejected
from tetri.core.worker.worker import Worker
from tetri.engine_request import Sampled, Span, StepDone
from tetri.policy.rules import Rules
from tetri.request import blocks_for
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.handover import Chunk, Drop, Offer
from tetri.wire.messages import Close, Failed, Resend, Staged, TokenItem, Tokens


class Prefilling(Told):
    """Runs the engine's part: every step runs what was planned, exports get the slots of their blocks' numbers."""

    def step(self, *tokens, estimates=()):
        """Plan and run a step; `tokens` are (rid, token, reason) of the prompts that end in it."""
        planned = self.later()
        assert kinds(planned)[-1] == "Step", kinds(planned)
        spans = tuple(self.core.prefill.expected)
        sampled = tuple(Sampled(f"p:{rid}:1", (token,), reason) for rid, token, reason in tokens)
        held = tuple((span.key, blocks_for(span.stop, 4)) for span in spans)
        return planned + self.tell(StepDone(spans=spans, tokens=sampled, held=held, estimates=tuple(estimates)))

    def result(self, action):
        if not isinstance(action, Export):
            return super().result(action)
        slots = handle(*range(action.start, action.stop))
        return Exported(action.key, action.index, action.start, action.stop, slots, 9)


def start(decoders=("d1",), **changes):
    told = Prefilling(Worker(identity("p1", "prefill", **changes), Random(1), now=0.0))
    told.later()
    see(told, 1, *decoders)
    return told


def see(told, number, *decoders, free_blocks=10):
    """The other instances as the broker and the monitor tell of them."""
    others = [*(instance(iid, "decode") for iid in decoders), instance("p2", "prefill")]
    actions = told.tell(view(number, **dict.fromkeys(decoders, free_blocks)))
    actions += told.tell(membership(number, instance("p1", "prefill"), *others))
    new = [iid for iid in decoders if iid not in told.core.peers.up]
    return actions + told.tell(*[PeerUp(iid) for iid in new])


@pytest.fixture
def prefill():
    told = start()
    yield told
    told.core.check()


@pytest.fixture
def two():
    told = start(("d1", "d2"))
    yield told
    told.core.check()


def spans(told):
    return [(span.key, span.start, span.stop) for span in told.core.prefill.expected]


# ---------------------------------------------------------------- chunks


def test_a_chunk_holds_the_tail_of_one_prompt_and_the_heads_of_others():
    prefill = start(capacity=capacity(max_batch=3))
    prefill.tell(assign("a", prompt=10), assign("b", prompt=3), assign("c", prompt=20))
    prefill.later()
    assert spans(prefill) == [("p:a:1", 0, 8)]
    prefill.tell(StepDone(spans=(Span("p:a:1", 0, 8),), held=(("p:a:1", 3),)))
    actions = prefill.later()
    assert spans(prefill) == [("p:a:1", 8, 10), ("p:b:1", 0, 3), ("p:c:1", 0, 3)]
    assert [action.request.key for action in only(actions, AddRequest)] == ["p:b:1", "p:c:1"]
    prefill.tell(RequestRejected("p:c:1", "no"))  # the engine has room for the others only
    assert spans(prefill) == [("p:a:1", 8, 10), ("p:b:1", 0, 3)]


def test_a_leg_that_the_engine_rejects_leaves_its_place_to_the_others(prefill):
    prefill.tell(assign("a", prompt=6), assign("b", prompt=6))
    prefill.later()
    assert spans(prefill) == [("p:a:1", 0, 6), ("p:b:1", 0, 2)]
    actions = prefill.tell(RequestRejected("p:a:1", "too odd"))
    assert sent(actions, BROKER) == [Failed(iid="p1", incarnation=1, rid="a", attempt=1, why="too odd", retry=False)]
    assert spans(prefill) == [("p:b:1", 0, 6)]
    prefill.tell(StepDone(spans=(Span("p:b:1", 0, 6),), tokens=(Sampled("p:b:1", (5,), None),)))


def test_only_prompts_that_the_ledger_has_room_for_are_started(prefill):
    prefill.tell(offer("x", prompt=20, src="p2"))  # 5 of 10 blocks
    prefill.tell(assign("a", prompt=2), assign("b", prompt=20), assign("c", prompt=2))
    prefill.later()
    assert spans(prefill) == [("p:a:1", 0, 2)]
    held = (("d:x:1:p2:1", 5), ("p:a:1", 1))
    prefill.tell(StepDone((Span("p:a:1", 0, 2),), (Sampled("p:a:1", (5,), None),), ("d:x:1:p2:1",), (), held))
    prefill.later()
    assert spans(prefill) == [("p:b:1", 0, 8)]


def test_no_more_legs_than_the_engine_takes_at_once(prefill):
    prefill.tell(*[assign(rid, prompt=1) for rid in "abc"])
    prefill.later()
    assert len(spans(prefill)) == 2


def test_chunks_wait_for_slots_of_the_store():
    told = start(slots=6)
    told.tell(assign("a", prompt=16))
    told.step()
    assert "Step" not in kinds(told.later()) and told.core.prefill.short
    assert only(told.tell(grant("a"), landed("a", 0)), Free)
    told.step(("a", 7, None))
    told.core.check()


def test_a_window_of_prompts_at_a_time_is_ordered(prefill):
    prefill.tell(*[assign(f"r{number}", prompt=1) for number in range(20)])
    prefill.later()
    assert (len(prefill.core.prefill.queue.line), len(prefill.core.prefill.queue.raw)) == (16, 4)
    assert prefill.core.reporter.load().queued == 20


def test_the_same_assignment_again_changes_nothing(prefill):
    prefill.tell(assign("a", prompt=4))
    assert not prefill.tell(assign("a", prompt=4)) and len(prefill.core.prefill.requests) == 1


def test_a_later_attempt_replaces_an_older_one(prefill):
    prefill.tell(assign("a", prompt=12), grant("a"))
    prefill.step()
    actions = prefill.tell(assign("a", prompt=12, output=[5], attempt=2))
    assert kinds(actions) == ["CancelRequest", "Drop > d1", "Free"]
    assert list(prefill.core.prefill.requests) == ["p:a:2"]


@pytest.mark.parametrize("prompt", [0, 40, 41])
def test_what_does_not_fit_fails_for_good(prefill, prompt):
    (message,) = sent(prefill.tell(assign("a", prompt=prompt)), BROKER)
    assert isinstance(message, Failed) and not message.retry and f"{prompt} tokens do not fit" in message.why


def test_what_is_larger_than_the_engine_fails_for_good():
    told = start(capacity=capacity(blocks=2))
    assert not sent(told.tell(assign("a", prompt=9)), BROKER)[0].retry


# ---------------------------------------------------------------- the first token, and KV that leaves


def test_one_request_from_assign_to_landed(prefill):
    prefill.tell(assign("a", prompt=14))
    first = prefill.step()
    assert kinds(first) == ["AddRequest", "Staged > broker", "Offer > d1", "Step", "Export", "Chunk > d1"]
    assert sent(first, kind=Offer)[0].blocks == 4 and sent(first, kind=Staged)[0].stage == "prefill"
    (chunk,) = sent(first, kind=Chunk)
    assert (chunk.index, chunk.start, chunk.stop, chunk.token) == (0, 0, 2, None)
    last = prefill.step(("a", 7, None))
    assert kinds(last) == ["Step", "Tokens > broker", "Staged > broker", "Export", "Chunk > d1"]
    (chunk,) = sent(last, kind=Chunk)
    assert (chunk.index, chunk.start, chunk.stop, chunk.token) == (1, 2, 4, 7)
    assert not prefill.tell(grant("a"))
    assert kinds(prefill.tell(landed("a", 0), landed("a", 0), landed("a", 1))) == ["Free", "Free"]
    assert prefill.core.prefill.slots_used == 0
    assert not prefill.tell(Close(rid="a", attempt=1)) and not prefill.core.dispatcher.offers


def test_blocks_that_a_chunk_does_not_fill_leave_with_the_next(prefill):
    prefill.tell(assign("a", prompt=3), assign("b", prompt=9))
    actions = prefill.step(("a", 7, None))
    assert [(export.key, export.start, export.stop) for export in only(actions, Export)] == [
        ("p:a:1", 0, 1),
        ("p:b:1", 0, 1),
    ]
    actions = prefill.step(("b", 7, None))
    assert [(export.key, export.start, export.stop) for export in only(actions, Export)] == [("p:b:1", 1, 3)]


def test_tokens_of_earlier_attempts_are_prefilled_and_still_count_as_output(prefill):
    prefill.tell(assign("a", prompt=4, output=[5, 6], max_tokens=4))
    actions = prefill.step(("a", 7, None))
    (engine_request,) = only(actions, AddRequest)
    assert (engine_request.request.tokens, engine_request.request.output_from) == ((1, 1, 1, 1, 5, 6), 4)
    assert sent(actions, kind=Tokens)[0].items[0].start == 2


@pytest.mark.parametrize("max_tokens, reason", [(1, "length"), (1, None), (8, "stop")])
def test_a_first_token_that_ends_the_request_moves_no_more(prefill, max_tokens, reason):
    prefill.tell(assign("a", prompt=12, max_tokens=max_tokens))
    prefill.step()
    actions = prefill.step(("a", 7, reason))
    (item,) = sent(actions, kind=Tokens)[0].items
    end = item.end
    assert (item.start, item.ids, end.reason) == (0, [7], reason or "length")
    assert (end.receipt.adopted, end.receipt.kv_bytes, end.receipt.transport) == (0, 0, "none")
    assert (end.receipt.prefill_instance, end.receipt.decode_instance) == ("p1", None)
    assert not only(actions, Export) and prefill.core.prefill.slots_used == 0
    dropped = max_tokens > 1
    assert bool(sent(actions, "d1", Drop)) == dropped and bool(only(actions, Free)) == dropped
    assert [hold.stage for hold in prefill.core.prefill.holds()] == ["done"]


def test_a_request_that_its_first_token_ends_takes_no_slots():
    told = start(slots=1)
    told.tell(assign("a", prompt=12, max_tokens=1))
    told.step()
    told.step(("a", 7, "length"))
    told.core.check()


def test_what_was_exported_for_nobody_is_freed(prefill):
    prefill.core.prefill.kv_send.used = 2
    assert only(prefill.tell(Exported("p:gone:1", 0, 0, 2, handle(0, 1), 9)), Free)


def test_tokens_are_sent_again(prefill):
    prefill.tell(assign("a", prompt=2, output=[5]), assign("b", prompt=2, max_tokens=1))
    prefill.step(("a", 7, None), ("b", 8, "length"))
    (again,) = sent(prefill.tell(Resend(rid="a", attempt=1, start=0)), BROKER)
    assert again.items == [TokenItem("a", 1, 0, [5, 7])]
    (again,) = sent(prefill.tell(Resend(rid="b", attempt=1, start=0)), BROKER)
    end = again.items[0].end
    assert again.items == [TokenItem("b", 1, 0, [8], end)] and end.reason == "length"
    assert not prefill.tell(Resend(rid="a", attempt=1, start=2), Resend(rid="a", attempt=2, start=0))
    (again,) = sent(prefill.tell(Resend(rid="b", attempt=1, start=1)), BROKER)
    assert again.items == [TokenItem("b", 1, 1, [], end)]


def test_a_token_too_early_or_twice_must_not_go_on(prefill):
    prefill.tell(assign("a", prompt=12))
    prefill.later()
    done = StepDone(spans=(Span("p:a:1", 0, 8),), tokens=(Sampled("p:a:1", (7,), None),), held=(("p:a:1", 3),))
    with pytest.raises(Broken, match="a token for p:a:1 at 8 of 12"):
        prefill.core.handle(done, 0.0)


# ---------------------------------------------------------------- offers


def test_an_offer_and_its_chunks_are_repeated_until_answered(prefill):
    prefill.tell(assign("a", prompt=8))
    prefill.step(("a", 7, None))
    assert [kind for kind in kinds(prefill.later(1.0)) if "d1" in kind] == ["Offer > d1", "Chunk > d1"]
    prefill.tell(grant("a"))
    assert [kind for kind in kinds(prefill.later(1.0)) if "d1" in kind] == ["Chunk > d1"]


def test_after_a_landing_the_offer_is_not_repeated_though_the_grant_was_lost(prefill):
    prefill.tell(assign("a", prompt=16))
    prefill.step()
    prefill.step(("a", 7, None))
    prefill.tell(landed("a", 0))
    assert [kind for kind in kinds(prefill.later(1.0)) if "d1" in kind] == ["Chunk > d1"]


def test_what_is_complete_is_asked_for_until_the_broker_closes_it(prefill):
    prefill.tell(assign("a", prompt=8))
    prefill.step(("a", 7, None))
    prefill.tell(landed("a", 0))
    assert [kind for kind in kinds(prefill.later(1.0)) if "d1" in kind] == ["Chunk > d1"]
    assert not prefill.tell(landed("a", 0))
    (failed,) = sent(prefill.tell(refuse("a")), BROKER)
    assert failed.retry and not prefill.core.prefill.requests
    assert not sent(prefill.later(1.0), "d1")


def test_a_connection_that_stands_again_repeats_all(prefill):
    prefill.tell(assign("a", prompt=8))
    prefill.step(("a", 7, None))
    assert kinds(prefill.tell(PeerUp("d1"))) == ["Offer > d1", "Chunk > d1"]


def test_a_refused_offer_goes_to_another_with_the_same_slots(two):
    two.tell(assign("a", prompt=8))
    two.step(("a", 7, None))
    actions = two.tell(refuse("a"))
    assert kinds(actions) == ["Offer > d2", "Chunk > d2"] and sent(actions)[0].offer == 2
    assert not two.tell(refuse("a", number=2, src="d2"))  # nobody is left, until the next view
    assert kinds(see(two, 2, "d1", "d2"))[:2] == ["Offer > d1", "Chunk > d1"]


def test_old_answers_and_answers_to_others_are_ignored(two):
    two.tell(assign("a", prompt=8))
    two.step(("a", 7, None))
    two.tell(refuse("a"))
    for old in (refuse("a"), landed("a", 0), landed("x", 0, number=2, src="d2"), refuse("a", 2, "d2", attempt=9)):
        assert not two.tell(old)
    assert two.core.prefill.requests["p:a:1"].flow.target == "d2"


def test_a_refusal_after_something_moved_needs_another_attempt(prefill):
    prefill.tell(assign("a", prompt=16))
    prefill.step()
    prefill.tell(grant("a"), landed("a", 0))
    actions = prefill.tell(refuse("a"))
    assert kinds(actions) == ["CancelRequest", "Drop > d1", "Failed > broker"] and sent(actions, BROKER)[0].retry


@pytest.mark.parametrize("loss", [PeerDown("d1"), membership(2, instance("p1", "prefill"), instance("d2", "decode"))])
def test_a_lost_decode_instance_is_replaced_if_nothing_moved(two, loss):
    two.tell(assign("a", prompt=8))
    two.step(("a", 7, None))
    assert [kind for kind in kinds(two.tell(loss)) if "d2" in kind] == ["Offer > d2", "Chunk > d2"]


@pytest.mark.parametrize("parts", [1, 2])
def test_a_decode_instance_lost_with_some_or_all_of_the_kv_needs_another_attempt(two, parts):
    two.tell(assign("a", prompt=16))
    two.step()
    two.step(("a", 7, None))
    two.tell(*[landed("a", index) for index in range(parts)])
    (failed,) = sent(two.tell(PeerDown("d1")), BROKER)
    assert failed.retry and "was lost with part of the KV" in failed.why


def test_memory_on_offer_counts_before_the_next_view():
    two = start(("d1", "d2"), slots=11)
    two.tell(assign("a", prompt=24), assign("b", prompt=24), assign("c", prompt=24))
    actions = two.step() + two.step() + two.step(("a", 7, None)) + two.step()
    assert [(each.rid, each.blocks) for each in sent(actions, kind=Offer)] == [("a", 6), ("b", 6)]
    assert sent(actions, "d1", Offer)[0].rid == "a" and sent(actions, "d2", Offer)[0].rid == "b"


def test_none_overtakes_another_that_found_no_place():
    prefill = start(slots=11)
    see(prefill, 2, "d1", free_blocks=4)
    prefill.tell(assign("a", prompt=20), assign("b", prompt=4))
    actions = prefill.step() + prefill.step() + prefill.step(("a", 7, None), ("b", 7, None))
    assert not sent(actions, kind=Offer)
    assert [each.rid for each in sent(see(prefill, 3, "d1"), kind=Offer)] == ["a", "b"]


def test_without_views_who_refused_is_asked_again_as_often_as_views_would_come():
    """Nothing else tells that there is room again; a roster comes more seldom."""
    told = start(load_s=0.1)
    told.tell(assign("a", prompt=8))
    told.step(("a", 7, None))
    assert not sent(told.tell(refuse("a")), "d1") and not sent(told.later(0.1), "d1")
    told.now += 2.0
    told.tell(membership(2, instance("p1", "prefill"), instance("d1", "decode"), instance("p2", "prefill")))
    number = told.core.prefill.requests["p:a:1"].flow.offer
    told.later()
    assert not sent(told.tell(refuse("a", number)), "d1")
    assert [each.offer for each in sent(told.later(0.1), "d1", Offer)] == [number + 1]


def test_only_reachable_decode_instances_of_the_same_kind_are_asked():
    told = start(())
    strange = instance("d1", "decode", fingerprint=fingerprint(dtype="f32"))
    told.tell(membership(2, strange, instance("d2", "decode"), instance("p2", "prefill")), PeerUp("d1"), PeerUp("p2"))
    told.tell(assign("a", prompt=4))
    assert not sent(told.step(("a", 7, None)), kind=Offer)
    assert sent(told.tell(PeerUp("d2")), "d2", Offer)
    told.core.check()


def test_patience_without_a_decode_instance_ends_for_each_at_its_time():
    told = start(())
    told.tell(assign("a", prompt=4))
    told.step(("a", 7, None))
    told.now = 5.0
    told.tell(assign("b", prompt=4))
    told.step(("b", 7, None))
    (failed,) = sent(told.later(5.2), kind=Failed)
    assert (failed.rid, failed.retry) == ("a", False) and "no decode instance could be reached for 10 s" in failed.why
    assert [each.rid for each in sent(told.later(5.2), kind=Failed)] == ["b"]
    told.core.check()


def test_patience_begins_anew_when_one_was_there():
    told = start(())
    told.tell(assign("a", prompt=4))
    told.step(("a", 7, None))
    told.now = 9.0
    see(told, 2, "d1", free_blocks=0)
    told.tell(PeerDown("d1"))
    assert not sent(told.later(5.0), kind=Failed)


# ---------------------------------------------------------------- closing


def test_closing_before_it_was_started(prefill):
    prefill.tell(assign("a", prompt=4))
    assert not prefill.tell(Close(rid="a", attempt=1)) and not prefill.core.prefill.queue.raw


def test_closing_while_it_computes(prefill):
    prefill.tell(assign("a", prompt=12))
    prefill.step()
    assert kinds(prefill.tell(Close(rid="a", attempt=2))) == ["CancelRequest", "Drop > d1", "Free"]
    assert not prefill.core.prefill.queue.line and prefill.core.ledger.free == 10


def test_closing_while_it_moves(prefill):
    prefill.tell(assign("a", prompt=8))
    prefill.step(("a", 7, None))
    actions = prefill.tell(Close(rid="a", attempt=1))
    assert kinds(actions) == ["Drop > d1", "Free"] and not only(actions, CancelRequest)


def test_closing_an_older_attempt_leaves_the_new_one(prefill):
    prefill.tell(assign("a", prompt=8, attempt=2))
    assert not prefill.tell(Close(rid="a", attempt=1)) and prefill.core.prefill.requests


def test_an_older_attempt_that_comes_late_is_closed_alone(prefill):
    prefill.tell(assign("a", prompt=8, attempt=2), assign("a", prompt=8, attempt=1))
    assert len(prefill.core.prefill.requests) == 2
    prefill.tell(Close(rid="a", attempt=1))
    assert list(prefill.core.prefill.requests) == ["p:a:2"]


# ---------------------------------------------------------------- what must not be


def test_a_leg_that_was_planned_without_room_must_not_go_on(monkeypatch):
    told = start()
    told.tell(assign("a", prompt=8))
    monkeypatch.setattr(told.core.ledger, "allocate", lambda key, blocks: False)
    with pytest.raises(Broken, match="p:a:1 was planned without room"):
        told.core.tick(0.0)


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (lambda half, request: half.queue.line.update({request.key: None}), "still queued"),
        (lambda half, request: setattr(request, "running", True), "accounts and legs differ"),
        (lambda half, request: setattr(request.flow, "exported", 0), "moved more blocks"),
        (lambda half, request: setattr(half.kv_send, "used", 9), "9 of 8 slots"),
        (lambda half, request: half.started.update(x=request), "and others run"),
        (lambda half, request: half._attempts.clear(), "their index differ"),
    ],
)
def test_check_finds_what_is_wrong(spoil, complaint):
    told = start()
    told.tell(assign("a", prompt=8))
    told.step(("a", 7, None))
    spoil(told.core.prefill, told.core.prefill.requests["p:a:1"])
    with pytest.raises(Broken, match=complaint):
        told.core.check()


# ---------------------------------------------------------------- order


def test_windows_are_ordered_when_a_chunk_wants_them_and_never_interleave():
    """Windows of two, shortest first: "c" is shorter than all, but of the second window; "d" joins it in time."""
    told = start(rules=Rules(order="sjf", sched_batch=2), capacity=capacity(max_batch=3), slots=11)
    told.tell(assign("a", 7), assign("b", 5), assign("c", 1))
    first = told.step(("b", 9, None))
    assert list(told.core.prefill.queue.line) == ["p:a:1"] and list(told.core.prefill.queue.raw) == ["p:c:1"]
    assert [action.request.key for action in first if isinstance(action, AddRequest)] == ["p:b:1", "p:a:1"]
    told.tell(assign("d", 2))
    second = told.step(("a", 9, None), ("c", 9, None), ("d", 9, None))
    assert [action.request.key for action in second if isinstance(action, AddRequest)] == ["p:c:1", "p:d:1"]
    told.core.check()


# ---------------------------------------------------------------- unlike decode instances


def test_what_fits_nowhere_fails_in_time_and_holds_nobody_up():
    """The only decode instance left is too small for "a": whoever comes after it goes on."""
    told = start(())
    told.tell(membership(2, instance("p1", "prefill"), instance("d1", "decode", capacity=capacity(blocks=2))))
    told.tell(PeerUp("d1"))
    told.tell(assign("a", prompt=7, max_tokens=20), assign("b", prompt=1, max_tokens=4))
    actions = told.step(("a", 7, None), ("b", 8, None))
    assert [each.rid for each in sent(actions, "d1", Offer)] == ["b"]
    (failed,) = sent(told.later(10.1), kind=Failed)
    assert failed.rid == "a" and "no decode instance" in failed.why
    told.core.check()
