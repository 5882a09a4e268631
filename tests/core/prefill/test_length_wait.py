"""Who is asked how long an output will be, until when a prompt waits for that, and what follows from what comes later.
Chunks are of 8 tokens; the buckets of all odds have 4, and so have ranges."""

from dataclasses import replace

import pytest

from tests.core.build import assign, capacity, close, identity, refuse, update_length
from tests.core.driver import Working, working
from tests.core.reading import kinds, only, sent
from tetri.core.actions import BROKER, Export, LengthKnown, Predict, StayRequest
from tetri.core.prefill import length_wait as lengths
from tetri.policy.rules import Rules
from tetri.request import Expected, LengthDistribution, LengthRange
from tetri.wire.handover import Chunk, LengthUpdate, Offer
from tetri.wire.load import Load
from tetri.wire.messages import Tokens

MOST = 20
ROOMY = capacity(blocks=60, context=100, max_batch=4)
NOISY = Rules(length="noisy", decode_route="first_fit", length_wait_s=1.5)


def distribution(bucket):
    """All of it in one bucket, but for a little in the last one."""
    return LengthDistribution(4, tuple(0.9 if place == bucket else 0.1 if place == 4 else 0.0 for place in range(5)))


def span(low):
    return LengthRange(low=low, high=low + 4)


PRIOR, NAMED, TOLD = span(8), span(4), span(12)  # what comes of odds(2), odds(1) and odds(3)
STATE = {"a": distribution(3)}  # what the hidden state of `a` says


def learnt(kind, wait_s=0.25):
    rules = Rules(length="trained", decode_route="first_fit", length_granularity=4, length_wait_s=wait_s)
    return {"rules": rules, "expected": Expected(kind, distribution(2), note="made for a test")}


def begin(kind, *asked, iid="p1", wait_s=0.25, **changes):
    told = working(iid, "d1", **{**learnt(kind, wait_s), **changes})
    told.tell(*asked)
    return told


def ask(prompt, rid="a", **sampling):
    return assign(rid, prompt, **{"max_tokens": MOST, **sampling})


def named(bucket=1, key="p:a:1"):
    return LengthKnown(key, None, distribution(bucket))


def offered(actions):
    return [made.length for made in sent(actions, "d1", Offer)]


def corrected(actions):
    return [message.length for message in sent(actions, "d1", LengthUpdate)]


def status(told):
    return told.heartbeat().predictor


def late(told):
    return status(told).late


# ---------------------------------------------------------------- who is asked, and when a prompt is offered


@pytest.mark.parametrize(
    ("kind", "prompt", "asked", "at_once"),
    [
        ("prior", 6, False, [PRIOR]),
        ("prior", 12, False, [PRIOR]),
        ("hidden", 8, False, []),  # its own state comes with the very next step
        ("hidden", 9, False, [PRIOR]),  # its KV leaves before
        ("classifier", 6, True, []),
        ("classifier", 12, True, []),
        ("both", 8, False, []),
        ("both", 12, True, []),
    ],
)
def test_what_a_prompt_is_offered_with_when_it_starts(kind, prompt, asked, at_once):
    told = begin(kind)
    assert [predict.key for predict in only(told.tell(ask(prompt)), Predict)] == ["p:a:1"] * asked
    assert offered(told.later()) == at_once


@pytest.mark.parametrize("kind", ["prior", "hidden", "classifier", "both"])
@pytest.mark.parametrize("prompt", [6, 12])
def test_a_length_that_the_request_fixes_is_not_predicted(kind, prompt):
    told = begin(kind)
    assert not only(told.tell(ask(prompt, max_tokens=5, ignore_eos=True)), Predict)
    assert offered(told.later()) == [LengthRange(low=5, high=6)]
    assert not corrected(told.step(estimates=STATE))
    assert (status(told).predicted, late(told)) == (0, 0)


@pytest.mark.parametrize("kind", ["prior", "hidden", "classifier", "both"])
def test_what_is_not_decoded_is_not_predicted_either(kind):
    told = begin(kind)
    assert not only(told.tell(ask(6, max_tokens=1)), Predict)
    assert not sent(told.step(), "d1") and not late(told)


def test_a_request_is_offered_when_its_length_is_known_and_none_overtakes_it():
    told = working("p1", "d1", rules=NOISY)
    actions = told.tell(assign("a", prompt=4), assign("b", prompt=4, output=[1] * 3))
    assert [(ask.key, ask.prompt) for ask in only(actions, Predict)] == [("p:a:1", (1,) * 4), ("p:b:1", (1,) * 4)]
    assert not sent(told.later(), kind=Offer)
    assert not told.tell(LengthKnown("p:b:1", LengthRange(low=0, high=2)), LengthKnown("p:gone:1", None))
    first, second = sent(told.tell(LengthKnown("p:a:1", None)), "d1", Offer)
    assert (first.rid, first.length, second.rid) == ("a", None, "b")
    assert second.length == LengthRange(low=2, high=4)  # three tokens are there already


# ---------------------------------------------------------------- until when it waits


@pytest.mark.parametrize(
    "answer, gives, found",
    [
        (named(), NAMED, (1, 0)),
        (LengthKnown("p:a:1", None), PRIOR, (0, 1)),  # when nobody can say nobody waits
        (LengthKnown("p:a:1", LengthRange(low=3, high=5)), LengthRange(low=3, high=5), (0, 0)),  # it is taken as it is
    ],
)
@pytest.mark.parametrize("started", [False, True])
def test_the_answer_that_comes_in_time_is_what_it_is_offered_with(started, answer, gives, found):
    """Also while the engine computes."""
    told = begin("classifier", ask(12))
    early = told.later() if started else []
    late = told.tell(answer) if started else told.tell(answer) + told.later()
    assert not offered(early) and offered(late) == [gives]
    assert (status(told).predicted, status(told).late) == found


def test_nobody_waits_longer_than_is_set():
    told = begin("classifier", ask(12), wait_s=0.5)
    told.step()
    assert not offered(told.later(0.49))
    assert offered(told.later(0.02)) == [PRIOR] and late(told) == 1


def test_without_what_was_learnt_it_is_offered_without_a_range_and_what_comes_then_is_of_no_use():
    told = working("p1", "d1", rules=NOISY, offer_s=2.0, view_s=60.0)
    told.tell(ask(12))
    told.now = 10.0  # nobody waits before it has started
    assert not offered(told.later()) and not offered(told.step()) and not offered(told.later(1.4))
    assert offered(told.later(0.2)) == [None]
    assert not told.tell(LengthKnown("p:a:1", NAMED)) and offered(told.later(2.0)) == [None]


def test_nobody_waits_for_a_prediction_any_more_when_it_is_there_or_of_no_use():
    told = begin("classifier", ask(12), ask(12, "b"))
    told.later()
    told.tell(named(key="p:b:1"), close("a", reason="cancelled"))
    told.later(5.0)
    assert late(told) == 0


def test_who_has_its_answer_and_no_place_is_not_offered_by_the_timer_of_the_wait():
    told = begin("classifier")
    told.view(d1=Load(free_blocks=0, deferred_blocks=10))
    told.tell(ask(12))
    told.step()
    assert not told.tell(named())
    assert not sent(told.later(1.0), kind=Offer) and late(told) == 0


@pytest.mark.parametrize("kind", ["classifier", "both", "hidden"])
@pytest.mark.parametrize("prompt", [6, 12])
def test_the_last_chunk_ends_the_wait(kind, prompt):
    """One of several chunks does not wait for its own state, and so is not late without it."""
    told = begin(kind, ask(prompt))
    actions = told.step() if prompt > 8 else []
    actions += told.step()
    assert offered(actions) == [PRIOR] and late(told) == (kind != "hidden" or prompt == 6)
    if prompt == 6:
        said = kinds(actions)
        assert said.index("Tokens > broker") < said.index("Offer > d1") < said.index("Chunk > d1")


def test_a_prompt_that_was_to_be_one_chunk_and_is_not_waits_no_longer():
    """Memory was short in the step: the engine ran less of it than planned."""
    told = begin("hidden", capacity=ROOMY, slots=30)
    told.land("x")
    told.step()
    told.tell(ask(6))
    assert not offered(told.later())
    assert offered(told.step(spans=[("a", 0, 3)], preempted="x")) == [PRIOR] and late(told) == 0


def test_one_that_its_first_token_ends_was_not_late():
    told = begin("classifier", ask(6))
    assert not sent(told.step(a="stop"), "d1") and late(told) == 0
    assert not told.tell(named()) and status(told).predicted == 1


# ---------------------------------------------------------------- what comes later


@pytest.mark.parametrize("kind", ["hidden", "both"])
@pytest.mark.parametrize("prompt", [6, 12])
def test_what_its_own_state_says_goes_with_the_offer_or_before_the_last_chunk(kind, prompt):
    told = begin(kind, ask(prompt), *[named()] * (kind == "both" and prompt == 12))
    if prompt == 12:
        assert offered(told.step()) == [PRIOR if kind == "hidden" else NAMED]
    messages = sent(told.step(estimates=STATE), "d1")
    assert [type(message) for message in messages] == [Offer if prompt == 6 else LengthUpdate, Chunk]
    assert messages[0].length == TOLD and messages[1].tokens == [7] and offered(told.later(1.0)) == [TOLD]
    assert (status(told).predicted, late(told)) == (1, 0)


@pytest.mark.parametrize("prompt", [6, 12])
def test_after_its_own_state_the_classifier_is_not_heard(prompt):
    told = begin("both", ask(prompt))
    if prompt > 8:
        told.step()
    assert offered(told.step(estimates=STATE)) == [TOLD]
    assert not told.tell(named()) and offered(told.later(1.0)) == [TOLD]


def test_the_same_again_is_not_said():
    told = begin("both", ask(12), named())
    told.step()
    assert not corrected(told.step(estimates={"a": distribution(1)}))


def test_who_is_on_offer_nowhere_is_offered_with_what_is_known_then():
    told = begin("classifier", ask(6))
    told.step()
    told.tell(refuse("a"))
    assert not told.tell(named())
    assert offered(told.view(d1=9)) == [NAMED]


def test_who_is_handed_over_by_then_is_corrected_there():
    told = begin("classifier", ask(6))
    told.step()
    told.tell(close("a"))
    assert sent(told.tell(named())) == [update_length("a", NAMED)]
    assert not told.tell(named()), "it is said once"
    told.tell(close("a", reason="stop", outputs=5))
    found = status(told)
    assert (found.predicted, found.scored, found.late) == (1, 1, 1)


@pytest.mark.parametrize(
    ("kind", "answers", "closes"),
    [
        ("classifier", [], [close("a", reason="stop", outputs=3)]),
        ("classifier", [], [close("a"), close("a", reason="stop", outputs=3)]),
        ("classifier", [], [close("a", reason="cancelled")]),
        ("classifier", [named()], [close("a")]),  # it is the second one
        ("both", [], [close("a")]),  # its hidden state has said more
    ],
)
def test_what_comes_when_it_is_over_or_known_is_not_heard(kind, answers, closes):
    told = begin(kind, ask(6), *answers)
    told.step(estimates=STATE if kind == "both" else {})
    told.tell(*closes)
    assert not told.tell(named())


def test_of_those_that_were_handed_over_the_newest_are_remembered(monkeypatch):
    monkeypatch.setattr(lengths, "MOST_PARTED", 2)
    told = begin("classifier")
    for rid in ("a", "b", "c"):
        told.tell(ask(2, rid))
        told.step()
        told.tell(close(rid))
    assert not told.tell(named(key="p:a:1"))
    assert corrected(told.tell(named(key="p:b:1"), named(key="p:c:1"))) == [NAMED, NAMED]


def test_one_that_its_first_token_ends_was_predicted_and_is_offered_to_nobody():
    told = begin("hidden", ask(6))
    said = told.step(a="stop", estimates=STATE)
    assert not sent(said, "d1") and len(sent(said, BROKER, Tokens)) == 1 and status(told).predicted == 1


def test_another_attempt_goes_on_from_its_output():
    told = begin("both", assign("a", 2, [5] * 9, attempt=2, max_tokens=MOST))
    told.tell(named(1, "p:a:2"))  # fewer than it has by now
    (before,) = offered(told.step())
    assert before.high > 10
    # 9 and 4 to 7 more are mostly in that bucket
    assert corrected(told.step(estimates={"a": distribution(1)})) == [span(12)]


# ---------------------------------------------------------------- on an instance that decodes too


def test_an_answer_at_home_takes_nobody_out_of_the_step_under_way():
    """`x` is decoded here, and its second attempt begins here too: the engine computes the first, which that one
    replaces."""
    told = begin("classifier", iid="m1", capacity=ROOMY, slots=30)
    told.meet()
    told.land("x")
    told.step()
    told.tell(assign("x", prompt=8, attempt=2, max_tokens=MOST))
    told.later()
    assert told.tell(named(key="p:x:2")) == []
    assert "Tokens > broker" in kinds(told.step()) and late(told) == 0
    assert {key.split(":")[2] for key in told.requests} == {"2"}


def test_after_an_answer_during_a_step_a_prompt_that_goes_on_stays_here():
    """And replaces its first attempt only when the token that this has got in the same step is reported."""
    told = begin("classifier", iid="m1", capacity=ROOMY, slots=30)
    told.meet()
    told.land("x")
    told.step()
    told.tell(assign("x", prompt=12, attempt=2, max_tokens=MOST))
    told.later()
    assert told.tell(named(key="p:x:2")) == []
    actions = told.step()
    assert kinds(actions)[-2:] == ["CancelRequest", "StayRequest"] and not only(actions, Export) and late(told) == 0
    assert [item.attempt for each in sent(actions, kind=Tokens) for item in each.items] == [1]
    told.step()
    assert [key.split(":")[:3] for key in told.requests] == [["d", "x", "2"]]


def test_one_that_the_step_ends_is_copied():
    """No engine lets it stay any more."""
    told = begin("classifier", iid="m1", capacity=ROOMY, slots=30)
    told.meet()
    told.tell(ask(8))
    told.later()
    assert told.tell(named()) == []
    actions = told.step()
    assert not only(actions, StayRequest) and told.key("a").startswith("d:")


@pytest.mark.parametrize("kind", ["classifier", "hidden", "both"])
def test_on_an_adaptive_instance_a_prompt_waits_for_no_answer_and_stays(kind):
    """Its length is corrected when the answer is there."""
    rules = replace(learnt(kind)["rules"], decode_route="adaptive")
    told = begin(kind, iid="m1", role="auto", rules=rules, capacity=ROOMY, slots=30)
    told.meet()
    told.tell(ask(6))
    assert only(told.later(), StayRequest) and late(told) == 0
    told.step(estimates=STATE)
    assert status(told).predicted == 1


def test_an_answer_during_a_step_goes_to_others_at_once():
    told = begin("classifier", capacity=ROOMY, slots=30)
    told.land("x")
    told.step()
    told.tell(assign("x", prompt=8, attempt=2, max_tokens=MOST))
    told.later()
    assert offered(told.tell(named(key="p:x:2"))) == [NAMED]


def test_at_home_a_correction_is_heard_at_once():
    """By the load that follows: so many blocks more."""
    told = begin("classifier", iid="m1", slots=30, capacity=capacity(blocks=60, context=100, chunk_tokens=16))
    told.meet()
    told.tell(ask(12))
    told.step()
    told.step()
    before = told.load().growth_blocks
    assert not sent(told.tell(named(3)))
    assert told.load().growth_blocks > before


# ---------------------------------------------------------------- ends, and what is said of it


@pytest.mark.parametrize(
    ("closes", "scored"),
    [
        ([close("a", reason="stop", outputs=13)], 1),
        ([close("a", reason="stop", outputs=13)] * 2, 1),
        ([close("a"), close("a", reason="stop", outputs=13)], 1),  # handed over, then over
        ([close("a", reason="cancelled")], 0),
        ([close("a", reason="cancelled"), close("a", reason="stop", outputs=13)], 0),
        ([close("a", reason="length")], 0),  # which its sampling fixed
        ([close("a")], 0),
    ],
)
def test_what_was_said_is_held_against_what_came(closes, scored):
    told = begin("hidden", ask(6))
    told.step(estimates=STATE)
    told.tell(*closes)
    found = status(told)
    assert (found.predicted, found.scored, found.right, found.inside) == (1, scored, scored, scored)
    assert (found.kind, found.note) == ("hidden", "made for a test")


def test_what_ends_elsewhere_teaches_the_prior():
    told = begin("prior", *(close(f"r{number}", reason="stop", outputs=2) for number in range(300)), ask(6))
    assert offered(told.later()) == [span(0)] and (status(told).kind, status(told).on) == ("prior", False)


def test_to_learn_one_must_know_from_what():
    with pytest.raises(ValueError, match='p1: length = "trained" needs'):
        Working(identity("p1", "prefill", rules=Rules(length="trained")))


@pytest.mark.parametrize("kind", ["classifier", "hidden", "both"])
def test_a_canary_is_not_predicted_and_teaches_nothing(kind):
    told = begin(kind, assign("a", prompt=1, max_tokens=2, ignore_eos=True, pinned="d1"))
    actions = told.step(estimates=STATE)
    assert sent(actions, "d1", Offer) and not only(actions, Predict) and not sent(actions, kind=LengthUpdate)
    told.tell(close("a", reason="cancelled"))
    assert told.heartbeat().predictor.predicted == 0


def test_without_an_estimator_a_canary_does_not_wait_for_a_prediction_either():
    told = working("p1", "d1", rules=NOISY)
    assert not told.tell(assign("a", prompt=1, max_tokens=2, ignore_eos=True, pinned="d1"))
    assert sent(told.step(), "d1", Offer)
