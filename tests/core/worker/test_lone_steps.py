"""Lone steps: announced to the broker, and so is their end; nothing else is computed in them."""

import pytest

from tests.core.build import assign, capacity, chunk, close, drop, grant, offer, refuse
from tests.core.driver import working
from tests.core.reading import kinds, only, sent
from tetri.core.actions import BROKER, AdmitRequest, HoldRequest, Step
from tetri.request import Stage
from tetri.wire.events import PeerDown
from tetri.wire.handover import Offer
from tetri.wire.messages import Failed, Heartbeat, LoneStep, Proceed, Staged, TokenItem, Tokens

ROOMY = {"capacity": capacity(blocks=40, context=100, max_batch=4), "slots": 30}


def suspect(rid="s", prompt=6, **changes):
    return assign(rid, prompt, max_tokens=20).changed(alone=True, **changes)


def announced(actions):
    return [(each.rid, each.number, each.stage.value, each.over) for each in sent(actions, BROKER, LoneStep)]


def proceed(number, rid="s"):
    return Proceed(rid=rid, attempt=1, number=number)


def stepped(told):
    """What the step under way computes, once it begins."""
    return told.chunk() if only(told.later(), Step) else None


@pytest.fixture
def prefill():
    """`a` has computed a chunk, `s` is a suspect, `b` has come after it."""
    told = working("p1", "d1", **ROOMY)
    told.tell(assign("a", 12, max_tokens=20), suspect(prompt=12), assign("b", 6, max_tokens=20))
    told.step()
    return told


# ---------------------------------------------------------------- prefill


def test_a_whole_prefill_is_computed_in_steps_of_its_own_in_its_turn(prefill):
    assert prefill.run() == [("a", 8, 12)], "nothing shares the rest of the chunk with it"
    actions = prefill.later()
    assert announced(actions) == [("s", 1, "prefill", False)] and not only(actions, Step)
    assert kinds(actions)[0] == "AddRequest" and [o.alone for o in sent(actions, "d1", Offer)] == [True]
    assert stepped(prefill) is None
    prefill.tell(proceed(1))
    assert stepped(prefill) == [("s", 0, 8)]
    assert announced(prefill.step()) == [("s", 2, "prefill", True)] and stepped(prefill) is None
    prefill.tell(proceed(2))
    assert announced(prefill.later()) == [("s", 3, "prefill", False)]
    prefill.tell(proceed(3))
    assert stepped(prefill) == [("s", 8, 12)]
    ended = prefill.step()
    assert [item.rid for each in sent(ended, BROKER, Tokens) for item in each.items] == ["s"]
    assert announced(ended) == [("s", 4, "prefill", True)] and stepped(prefill) is None
    prefill.tell(proceed(4))
    assert stepped(prefill) == [("b", 0, 6)]


def test_until_the_broker_answers_nothing_is_computed_and_heartbeats_repeat_the_question(prefill):
    prefill.run(), prefill.later()
    for number in (0, 2, 9):
        prefill.tell(proceed(number))  # of other steps
    for _ in range(3):
        actions = prefill.later(0.1)
        assert [type(each) for each in sent(actions, BROKER)][-2:] == [Heartbeat, LoneStep]
        assert announced(actions) == [("s", 1, "prefill", False)] and not only(actions, Step)
    prefill.tell(proceed(1))
    prefill.later()
    assert announced(prefill.step()) == [("s", 2, "prefill", True)]
    assert announced(prefill.later(0.1)) == [("s", 2, "prefill", True)]
    prefill.tell(proceed(2))
    assert not announced(prefill.tell(close("s"))) and stepped(prefill) == [("b", 0, 6)]
    prefill.step()
    assert not announced(prefill.later(0.1))


def test_who_is_closed_meanwhile_is_waited_for_no_more(prefill):
    prefill.run(), prefill.later()
    prefill.tell(close("s"))
    assert stepped(prefill) == [("b", 0, 6)]
    prefill.tell(proceed(1))
    prefill.step()
    assert not announced(prefill.later(0.1))


def test_started_ones_and_the_batch_are_held_meanwhile():
    told = working("m1", "d1", role="mixed", **ROOMY)
    told.running("x", "y", max_tokens=20)
    told.tell(suspect(prompt=6), assign("b", 20, max_tokens=20))
    actions = told.later()
    assert announced(actions) == [("s", 1, "prefill", False)]
    told.tell(proceed(1))
    begun = told.later()
    assert only(begun, HoldRequest) == [HoldRequest(told.key("x"), True), HoldRequest(told.key("y"), True)]
    done = told.step()
    assert only(done, HoldRequest) == [HoldRequest(told.key("x"), False), HoldRequest(told.key("y"), False)]
    assert {item.rid for each in sent(done, BROKER, Tokens) for item in each.items} == {"s"}
    told.tell(proceed(2))
    told.later()
    items = [item.rid for each in sent(told.step(), BROKER, Tokens) for item in each.items]
    assert items == ["x", "y"] and told.core.decode.batch.held == []


def test_a_step_for_which_slots_are_short_by_then_is_over_before_it_begins():
    """Its grant is lost while it waits, and with it the slots that only granted ones may use."""
    told = working("p1", "d1", capacity=capacity(blocks=40, context=100, max_batch=4), slots=5)
    told.tell(suspect(prompt=20))
    told.later()
    told.tell(proceed(1))
    told.later()
    told.answer("s", grant)
    told.step()
    told.tell(proceed(2))
    assert announced(told.later()) == [("s", 3, "prefill", False)]
    told.answer("s", refuse)
    told.tell(proceed(3))
    assert announced(told.later()) == [("s", 4, "prefill", True)]
    told.tell(proceed(4))
    assert stepped(told) is None and not announced(told.later())


@pytest.fixture
def short():
    """`s` has started and waited for slots, while `x` has grown into memory that is not there. Now it may go on."""
    told = working("m1", "d1", role="prefill", capacity=capacity(blocks=6, context=24, max_batch=4), slots=3)
    told.running("x", max_tokens=14)
    told.tell(suspect(prompt=12))
    while told.core.ledger.free >= 0:
        told.step()
    told.answer("s", grant)
    return told


def test_a_prompt_yields_to_a_batch_that_has_its_memory(short):
    """Alone it would find none, again and again."""
    actions = short.later()
    assert not announced(actions) and only(actions, Step) and short.chunk() == [] and short.key("s") in short.held
    short.step()
    short.tell(close("x"))
    assert announced(short.later()) == [("s", 1, "prefill", False)]


def test_a_prompt_does_not_yield_to_a_batch_that_cannot_go_on(short):
    short.later()
    assert not announced(short.step(preempted=["x"])) and not short.core.idle
    assert announced(short.later()) == [("s", 1, "prefill", False)]


# ---------------------------------------------------------------- decode


@pytest.fixture
def decode():
    """`x` runs, `s` is a suspect that has landed."""
    told = working("d1", "p1", **ROOMY)
    told.running("x", max_tokens=20)
    return told


def test_a_decode_begins_alone_and_shares_steps_once_its_token_is_sent(decode):
    decode.land("s", number=5, alone=True, max_tokens=20)
    actions = decode.later()
    assert announced(actions) == [("s", 1, "waiting", False)] and not only(actions, AdmitRequest)
    assert stepped(decode) is None
    decode.tell(proceed(1))
    begun = decode.later()
    x, s = decode.key("x"), decode.key("s")
    assert only(begun, AdmitRequest) == [AdmitRequest(s, 5)] and only(begun, HoldRequest) == [HoldRequest(x, True)]
    assert [each.stage for each in sent(begun, BROKER, Staged)] == [Stage.DECODE]
    done = decode.step()
    assert [each.items for each in sent(done, BROKER, Tokens)] == [[TokenItem("s", 1, 1, [6])]]
    assert only(done, HoldRequest) == [HoldRequest(x, False)] and announced(done) == [("s", 2, "waiting", True)]
    assert stepped(decode) is None
    decode.tell(proceed(2))
    assert stepped(decode) == []
    assert [item.rid for each in sent(decode.step(), BROKER, Tokens) for item in each.items] == ["x", "s"]


def test_with_rare_messages_it_is_alone_for_as_many_tokens_as_the_broker_may_lack():
    told = working("d1", "p1", stream_interval=3, **ROOMY)
    told.running("x", max_tokens=40)
    told.land("s", number=5, alone=True, max_tokens=20)
    alone = 0
    while announced(told.later()):
        told.tell(proceed(2 * alone + 1))
        told.later()
        told.step()
        told.tell(proceed(2 * alone + 2))
        alone += 1
    assert alone == 5  # two messages, less the token that the prefill has computed


def test_who_comes_before_a_suspect_is_admitted_first_and_suspects_go_one_at_a_time(decode):
    made = [offer(rid, 8, offer=5 + n, max_tokens=20, alone=rid != "a") for n, rid in enumerate("asb")]
    decode.tell(*made)
    decode.step()
    decode.tell(*(chunk(each.rid, 0, 0, 2, token=5, offer=each.offer) for each in made))
    first = decode.later()
    assert [action.key for action in only(first, AdmitRequest)] == [decode.key("a")] and only(first, Step)
    decode.step()
    assert announced(decode.later()) == [("s", 1, "waiting", False)]
    decode.tell(close("s"))
    assert announced(decode.later()) == [("b", 2, "waiting", False)], "one at a time"


def test_a_suspect_that_ends_or_is_closed_in_its_step_lets_the_others_go_on(decode):
    decode.land("s", number=5, alone=True, max_tokens=2)
    decode.later()
    decode.tell(proceed(1))
    decode.later()
    assert announced(decode.step()) == [("s", 2, "waiting", True)]
    decode.tell(close("s"), proceed(2))
    decode.later()
    assert [item.rid for each in sent(decode.step(), BROKER, Tokens) for item in each.items] == ["x"]


def test_a_suspect_waits_for_a_free_block_while_others_run_and_not_longer():
    told = working("d1", "p1", capacity=capacity(blocks=7, context=28, max_batch=4), slots=4)
    told.running("x", prompt=8, max_tokens=20)
    told.tell(offer("s", 8, offer=5, max_tokens=4, alone=True))
    while told.core.ledger.free:
        told.step()
    told.tell(chunk("s", 0, 0, 2, token=5, offer=5))
    assert not announced(told.later()), "the blocks are all in use"
    told.step()
    told.tell(close("x"))
    assert announced(told.later()) == [("s", 1, "waiting", False)]


# ---------------------------------------------------------------- what is lost with a decode instance


def test_the_dispatcher_avoids_instances_while_there_are_others():
    told = working("p1", "d1", "d2", **ROOMY)
    told.tell(suspect(lost=["d2"]))
    (made,) = sent(told.later(), kind=Offer)
    assert told.asked["s"][0] == "d1" and made.alone
    only_there = working("p1", "d2", **ROOMY)
    only_there.tell(suspect(lost=["d2"]))
    only_there.later()
    assert only_there.asked["s"][0] == "d2"


def test_what_may_have_killed_its_decode_instance_goes_on_once_and_is_given_up_the_second_time():
    """It may have run there, since all its KV was announced, whatever had come back."""
    told = working("p1", "d1", "d2", "d3", **ROOMY)
    told.tell(assign("a", 12, max_tokens=20))
    told.run()
    first = told.asked["a"][0]
    assert not sent(told.tell(PeerDown(first)), kind=Staged), "a part of it cannot run"
    told.meet("d1", "d2", "d3")
    told.run()
    second = told.asked["a"][0]
    told.answer("a", grant)
    lost = told.tell(PeerDown(second))
    assert [(each.stage.value, each.lost) for each in sent(lost, kind=Staged)] == [("moving", second)]
    third = told.asked["a"][0]
    assert third != second and not sent(lost, kind=Failed)
    told.answer("a", grant)
    lost = told.tell(PeerDown(third))
    assert [(each.rid, each.retry, each.lost) for each in sent(lost, kind=Failed)] == [("a", True, third)]


def test_what_has_landed_is_given_up_with_its_decode_instance():
    told = working("p1", "d1", "d2", **ROOMY)
    told.tell(assign("a", 6, max_tokens=20))
    told.run()
    told.answer("a", grant), told.take("a")
    lost = told.tell(PeerDown(told.asked["a"][0]))
    assert [(each.rid, each.retry, each.lost) for each in sent(lost, kind=Failed)] == [("a", True, told.asked["a"][0])]


def test_drops_of_suspects_end_their_turn(decode):
    decode.land("s", number=5, alone=True, max_tokens=20)
    decode.later()
    decode.tell(drop("s", offer=5))
    assert announced(decode.later(0.1)) == [("s", 1, "waiting", False)], "all its KV has landed: it is kept"
