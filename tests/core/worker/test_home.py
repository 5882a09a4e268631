"""Requests that decode in the engine that prefills them, with their KV in place: what ends the stay, at which moment,
and that it leaves nothing behind."""

import pytest

from tests.core.build import (
    assign,
    capacity,
    close,
    flip,
    grant,
    instance,
    membership,
    offer,
    refuse,
    resend,
)
from tests.core.driver import working
from tests.core.reading import kinds, only, sent
from tetri.core.actions import (
    AddRequest,
    CancelRequest,
    Export,
    Free,
    RequestRejected,
    StayRequest,
)
from tetri.core.prefill.scheduler import OVERTAKEN_S
from tetri.policy.rules import Rules
from tetri.request import Stage
from tetri.wire.handover import Grant, Offer
from tetri.wire.load import Load
from tetri.wire.messages import Failed, LoneStep, Proceed, Tokens

ROOMY = {"capacity": capacity(blocks=40, context=100, max_batch=4), "slots": 30}
PREFILL, DECODE = "p:a:1", "d:a:1:m1:1"
# Of a prompt of 12 tokens, in chunks of 8, with 4 tokens to come: so many steps are done, and none is planned.
MOMENTS = {"computed in part": 1, "computed": 2, "decoding": 3}


def begin(steps=0, **changes):
    told = working("m1", **{**ROOMY, **changes})
    told.tell(assign("a", prompt=12, max_tokens=4))
    for _ in range(steps):
        told.step()
    return told


def beside(steps):
    """Another request decodes all the time."""
    told = working("m1", **ROOMY).running("x", max_tokens=30)
    told.tell(assign("a", prompt=12, max_tokens=4))
    for _ in range(steps):
        told.step()
    return told


def clean(told):
    """Nothing of any request is here."""
    for attempt in (1, 2):
        told.tell(close("a", attempt))
    told.later()
    load = told.load()
    assert not told.requests and not told.stays and told.holds() == []
    assert (load.free_blocks, load.waiting, load.queued_tokens, load.growth_blocks) == (40, 0, 0, 0)
    assert told.heartbeat().slots_used == 0


def items(actions):
    return [item for message in sent(actions, kind=Tokens) for item in message.items]


# ---------------------------------------------------------------- the usual way


def test_it_is_one_engine_request_that_goes_on_and_no_message_or_kv_leaves():
    told = working("m1", **ROOMY)
    told.tell(assign("a", prompt=12, max_tokens=4))
    assert [kinds(told.step()) for _ in range(4)] == [
        ["AddRequest", "Staged > broker", "StayRequest", "Step"],
        ["Step", "Tokens > broker", "Staged > broker"],
        ["AdmitRequest", "Staged > broker", "Step", "Tokens > broker"],
        ["Step", "Tokens > broker"],
    ]
    (end,) = [item.end for item in items(told.step())]
    assert end.reason == "length" and end.receipt.prefill_instance == end.receipt.decode_instance == "m1"
    assert (end.receipt.local, end.receipt.adopted, end.receipt.recomputed) == (12, 0, 0)
    assert (end.receipt.transport, end.receipt.kv_bytes, end.receipt.chunks) == ("none", 0, 0)
    assert told.load().free_blocks == 40
    clean(told)


def test_its_memory_counts_once_and_grows_from_the_blocks_of_its_prompt():
    told = begin(1)
    assert told.load().free_blocks == 40 - 3
    told.step()
    assert told.load().free_blocks == 40 - 3
    told.step()
    assert told.load().free_blocks == 40 - 4  # 14 tokens


def test_it_is_listed_as_a_prefill_until_its_kv_is_there_and_then_by_both_phases():
    told = begin(1)
    assert told.holds() == [("a", "prefill", 0)]
    told.step()
    assert told.holds() == [("a", "moving", 1), ("a", "waiting", 1)]


def test_its_tokens_are_told_again():
    told = begin(4)
    again = items(told.tell(resend("a", 0)))
    assert [item.ids for item in again] == [[7], [7, 6, 6]]


# ---------------------------------------------------------------- it ends with its first token


@pytest.mark.parametrize("reason", ["stop", "error"])
def test_its_first_token_ends_it(reason):
    """Text that ends, or no valid number at all."""
    told = begin(1)
    actions = told.step(a=reason)
    (item,) = items(actions)
    assert item.end.reason == reason and item.end.receipt.local == 12 and item.end.receipt.decode_instance is None
    assert only(actions, CancelRequest) == [CancelRequest(DECODE)] and told.holds() == [("a", "done", 1)]
    assert told.load().free_blocks == 40
    clean(told)


def test_a_request_of_one_token_does_not_stay():
    told = working("m1", **ROOMY)
    told.tell(assign("a", prompt=4, max_tokens=1))
    assert not only(told.step(), StayRequest) and told.load().free_blocks == 40


# ---------------------------------------------------------------- whatever comes, at whatever moment


@pytest.mark.parametrize("steps", MOMENTS.values(), ids=MOMENTS)
def test_close(steps):
    told = begin(steps)
    actions = told.tell(close("a"))
    assert {action.key for action in only(actions, CancelRequest)} >= {PREFILL if steps < 2 else DECODE}
    assert not sent(actions) and not told.requests and told.load().free_blocks == 40
    clean(told)


@pytest.mark.parametrize("steps", MOMENTS.values(), ids=MOMENTS)
@pytest.mark.parametrize("prompt", [12, 16])
def test_another_attempt_from_elsewhere(steps, prompt):
    """The prefill of the earlier one ends with it, and says so."""
    told = begin(steps)
    actions = told.tell(offer("a", prompt=prompt, attempt=2, src="d9"))
    assert [answer.attempt for answer in sent(actions, "d9", Grant)] == [2]
    failures = [(each.attempt, each.retry) for each in sent(actions, kind=Failed)]
    assert failures == ([(1, True)] if steps == 1 else []) and not sent(actions, "m1")
    assert [*told.requests] == ["d:a:2:d9:1"]
    clean(told)


@pytest.mark.parametrize("steps", MOMENTS.values(), ids=MOMENTS)
def test_another_attempt_here(steps):
    told = begin(steps)
    told.tell(assign("a", prompt=12, output=[7], attempt=2, max_tokens=4))
    told.later()
    assert [key.split(":")[:3] for key in told.requests] == [["p", "a", "2"]] and len(told.stays) == 1
    told.step()
    told.step()
    told.step()
    assert [*told.requests] == ["d:a:2:m1:2"] and told.load().free_blocks == 40 - 4
    clean(told)


@pytest.mark.parametrize("steps", MOMENTS.values(), ids=MOMENTS)
@pytest.mark.parametrize("role", ["prefill", "decode", "auto"])
def test_a_flip_does_not_end_it(steps, role):
    told = begin(steps)
    told.tell(flip(role))
    ends = [told.step() for _ in range(5 - steps)]
    assert items(ends[-1])[-1].end.reason == "length"
    clean(told)


@pytest.mark.parametrize("steps", MOMENTS.values(), ids=MOMENTS)
@pytest.mark.parametrize(
    "late",
    [
        grant("a", 1, "m1"),
        refuse("a", 7, "m1"),
        offer("a", prompt=12, attempt=0, src="d9"),
        assign("a", prompt=12, max_tokens=4),
        assign("a", prompt=12, max_tokens=4, attempt=0),
        close("a", attempt=0),
        membership(9),
    ],
    ids=["grant", "refusal", "offer", "assign", "old assign", "old close", "membership"],
)
def test_what_comes_late_or_again_changes_nothing(steps, late):
    told = begin(steps)
    actions = told.tell(late)
    assert not only(actions, CancelRequest) and not only(actions, StayRequest)
    told.tell(close("a", attempt=0))
    while told.requests:
        told.step()
        told.later()
    assert (Stage.DONE.value, 4) in [hold[1:] for hold in told.holds()]
    clean(told)


@pytest.mark.parametrize("key, retry", [(PREFILL, False), (DECODE, True)])
def test_the_engine_rejects_it(key, retry):
    """As a prefill, or later as a decode request, which another instance may run."""
    told = begin(1 if key == PREFILL else 2)
    actions = told.tell(RequestRejected(key, "odd"))
    (failed,) = sent(actions, kind=Failed)
    assert failed.retry == retry and not told.requests and told.load().free_blocks == 40
    clean(told)


def test_the_engine_computes_its_prompt_again_after_a_preemption():
    told = beside(1)
    told.step(preempted="a", spans=[])
    assert [told.run(), told.run()] == [[("a", 0, 7)], [("a", 7, 12)]] and DECODE in told.requests
    told.tell(close("x"))
    clean(told)


def test_a_decode_that_is_computed_again_no_longer_counts_as_local():
    told = beside(3)
    told.step(preempted="a")
    (end,) = [item.end for _ in range(2) for item in items(told.step()) if item.end]
    receipt = end.receipt
    assert (receipt.local, receipt.adopted, receipt.recomputed, receipt.preempted) == (0, 0, 12, 1)
    told.tell(close("x"))
    clean(told)


# ---------------------------------------------------------------- when it can stay


def test_a_request_that_was_refused_elsewhere_stays_and_frees_what_had_left():
    told = begin(1, role="prefill")
    told.meet("d1")
    (peer, _) = told.asked["a"]
    assert peer == "d1" and told.heartbeat().slots_used == 2
    told.tell(flip("mixed"))
    actions = told.answer("a", refuse)
    assert only(actions, StayRequest) == [StayRequest(PREFILL, "d:a:1:m1:2")] and len(only(actions, Free)) == 1
    told.step()
    assert told.heartbeat().slots_used == 0 and not only(told.step(), Export)
    clean(told)


def test_kv_that_arrives_in_the_slab_after_that_is_freed():
    told = begin(role="prefill")
    told.meet("d1")
    told.exports = False
    (export,) = only(told.step(), Export)
    told.tell(flip("mixed"))
    assert only(told.answer("a", refuse), StayRequest) and told.heartbeat().slots_used == 2
    told.exports = True
    assert only(told.tell(told.result(export)), Free) and told.heartbeat().slots_used == 0
    clean(told)


def test_one_that_has_its_first_token_is_copied_to_its_own_instance():
    told = begin(2, role="prefill")
    assert told.holds() == [("a", "moving", 1)] and not told.requests
    actions = told.tell(flip("auto"))
    assert [each.request.key for each in only(actions, AddRequest)] == [DECODE] and not only(actions, StayRequest)
    for _ in range(4):
        told.step()
    (end,) = [hold for hold in told.holds() if hold[1:] == ("done", 4)]
    assert end[0] == "a"
    clean(told)


def test_choices_are_copied_to_their_own_instance():
    told = working("m1", **ROOMY)
    told.tell(assign("a", prompt=8, max_tokens=2, siblings=["b"]))
    actions = told.step() + told.step()
    receipts = [item.end.receipt for item in items(actions) if item.end]
    assert [(each.local, each.adopted, each.transport) for each in receipts] == [(0, 8, "local")] * 2
    assert not only(actions, StayRequest)
    told.tell(close("b"))
    clean(told)


def test_one_that_needs_more_than_half_of_the_memory_stays():
    told = begin(3, capacity=capacity(blocks=5, context=20), slots=3)
    assert told.load().free_blocks == 5 - 4


@pytest.mark.parametrize("role, starts", [("mixed", False), ("prefill", True)])
def test_a_prompt_that_may_stay_leaves_the_batch_what_it_will_need(role, starts):
    """Of 8 blocks `x` has three, and needs two more soon: four for a prompt would stay away until it ends."""
    told = working("m1", "d1", role=role, capacity=capacity(blocks=8, context=32))
    told.running("x", prompt=11, max_tokens=20)
    told.tell(assign("a", prompt=16, max_tokens=4))
    told.step()
    assert (PREFILL in told.requests) == starts
    told.step(x="stop")
    assert [span[0] for span in told.run()] == ["a"]


def test_one_that_finds_no_slots_stays_and_goes_on_at_once():
    """Of four slots, three are the reserve; `b` waits with a block in the last one."""
    told = working("m1", role="prefill", slots=4, capacity=capacity(blocks=40, context=100))
    told.tell(assign("b", prompt=4, max_tokens=4))
    told.step()
    assert told.heartbeat().slots_used == 1
    told.tell(flip("mixed"), assign("a", prompt=12, max_tokens=4))
    assert ("a", 0, 8) in told.run()


# ---------------------------------------------------------------- lone steps


def test_a_suspect_is_computed_alone_before_and_after():
    told = working("m1", **ROOMY)
    told.running("x", max_tokens=20)
    told.tell(assign("a", prompt=6, max_tokens=6).changed(alone=True))
    stages, number = [], 0
    for _ in range(40):
        for lone in sent(told.later(), kind=LoneStep):
            number += 1
            stages.append((lone.stage.value, lone.over))
            told.tell(Proceed(rid="a", attempt=1, number=lone.number))
        if told.most is not None:
            for lone in sent(told.step(), kind=LoneStep):
                stages.append((lone.stage.value, lone.over))
                told.tell(Proceed(rid="a", attempt=1, number=lone.number))
    assert stages[:4] == [("prefill", False), ("prefill", True), ("waiting", False), ("waiting", True)]
    assert ("a", "done", 6) in told.holds()
    told.tell(close("x"))
    clean(told)


# ---------------------------------------------------------------- where an adaptive instance lets its prompts decode


@pytest.mark.parametrize("role, stays", [("auto", True), ("mixed", False)])
def test_an_adaptive_instance_keeps_its_prompts_though_another_one_has_more_memory(role, stays):
    told = working("m1", "d1", role=role, rules=Rules(decode_route="adaptive"), **ROOMY)
    told.view(d1=1000)
    told.tell(assign("a", prompt=12, max_tokens=4))
    actions = told.step()
    assert bool(only(actions, StayRequest)) is stays and bool(sent(actions, "d1", Offer)) is not stays


@pytest.mark.parametrize("before, now", [("auto", "mixed"), ("mixed", "auto")])
def test_after_a_flip_the_rule_of_the_new_role_holds(before, now):
    told = working("m1", "d1", role=before, rules=Rules(decode_route="adaptive"), **ROOMY)
    told.view(d1=1000)
    told.tell(flip(now), assign("a", prompt=12, max_tokens=4))
    assert bool(only(told.step(), StayRequest)) is (now == "auto")


def test_an_adaptive_instance_without_memory_offers_its_prompt_to_the_shorter_step():
    others = (instance(iid, "decode", capacity=ROOMY["capacity"]) for iid in ("d1", "d2"))
    told = working("m1", *others, role="auto", rules=Rules(decode_route="adaptive"), **ROOMY)
    told.view(d1=Load(free_blocks=90, step_s=0.2), d2=Load(free_blocks=90, step_s=0.1))
    told.tell(assign("a", prompt=60, max_tokens=8, siblings=["b"]))  # 15 of 40 blocks, and two copies
    assert [each.rid for each in sent(told.step(), "d2", Offer)] == ["a"]


# ---------------------------------------------------------------- memory for a prompt beside hand-overs


def test_hand_overs_do_not_overtake_a_prompt_for_ever():
    """Decodes of four blocks come and end all the time, and the one prompt needs seven of twelve blocks."""
    told = working("m1", "p1", role="auto", capacity=capacity(blocks=12, context=48, max_batch=4), slots=30)
    told.running("r0", prompt=16, src="p1", max_tokens=6)
    told.tell(assign("a", prompt=28, max_tokens=4))
    began = told.now
    for number in range(1, 50):
        told.later(0.2)
        told.step()
        told.land(f"r{number}", prompt=16, number=1 + number, src="p1", max_tokens=6)
        if ("a", "queued", 0) not in told.holds():
            break
        told.tell(close(f"r{number - 1}"))
    assert OVERTAKEN_S <= told.now - began < OVERTAKEN_S + 2 and number > 3
