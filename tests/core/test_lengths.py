"""Who is asked how long an output will be, until when a prompt waits for that, and what follows from what comes later.
Chunks are of 8 tokens; the buckets of all odds have 4, and so have ranges."""

from random import Random

import pytest

from tests.core import test_mixed
from tests.core.build import assign, grant, identity, instance, kinds, membership, offer, only, refuse, sent, view
from tests.core.test_prefill import start
from tetri.core.actions import BROKER, LengthKnown, Predict
from tetri.core.prefill import length_wait as lengths
from tetri.core.worker.worker import Worker
from tetri.engine_request import HiddenStateEstimate, Sampled, Span, StepDone
from tetri.policy.rules import Rules
from tetri.request import Expected, LengthDistribution, LengthRange, Sampling
from tetri.wire.handover import Chunk, LengthUpdate, Offer
from tetri.wire.messages import Assign, Close, Tokens

KEY = "p:a:1"
MOST = 20


def distribution(bucket):
    """All of it in one bucket, but for a little in the last one."""
    return LengthDistribution(4, tuple(0.9 if place == bucket else 0.1 if place == 4 else 0.0 for place in range(5)))


def tokens(low):
    return LengthRange(low=low, high=low + 4)


PRIOR, NAMED, TOLD = tokens(8), tokens(4), tokens(12)  # what comes of odds(2), odds(1) and odds(3)


def learnt(kind, wait_s=0.25):
    rules = Rules(length="trained", decode_route="first_fit", length_granularity=4, length_wait_s=wait_s)
    return {"rules": rules, "expected": Expected(kind, distribution(2), note="made for a test")}


def begin(kind, **changes):
    return start(("d1",), **{**learnt(kind), **changes})


def ask(prompt, rid="a", **sampling):
    sampling = Sampling(**{"max_tokens": MOST, **sampling})
    return Assign(rid=rid, attempt=1, prompt=[1] * prompt, output=[], sampling=sampling)


def named(bucket=1, key=KEY):
    return LengthKnown(key, None, distribution(bucket))


def told(bucket=3, key=KEY, outputs=0):
    return HiddenStateEstimate(key, outputs, distribution(bucket))


def offered(actions):
    return [offer.length for offer in sent(actions, "d1", Offer)]


def update_length(actions):
    return [message.length for message in sent(actions, "d1", LengthUpdate)]


def status(worker):
    return worker.core.estimator.status()


ENDS = ("a", 7, None)  # the prompt ends in this step, and goes on to be decoded


# ---------------------------------------------------------------- who is asked, and when a prompt is offered


@pytest.mark.parametrize(
    ("kind", "prompt", "asked", "at_once"),
    [
        ("prior", 6, False, [PRIOR]),
        ("prior", 12, False, [PRIOR]),
        ("hidden", 6, False, []),  # its own state comes with the very next step
        ("hidden", 8, False, []),
        ("hidden", 9, False, [PRIOR]),  # its KV leaves before
        ("classifier", 6, True, []),
        ("classifier", 12, True, []),
        ("both", 6, False, []),
        ("both", 8, False, []),
        ("both", 12, True, []),
    ],
)
def test_what_a_prompt_is_offered_with_when_it_starts(kind, prompt, asked, at_once):
    worker = begin(kind)
    wanted = only(worker.tell(ask(prompt)), Predict)
    assert [predict.key for predict in wanted] == [KEY] * asked
    assert offered(worker.later()) == at_once


@pytest.mark.parametrize("kind", ["prior", "hidden", "classifier", "both"])
@pytest.mark.parametrize("prompt", [6, 12])
def test_a_length_that_the_request_fixes_is_not_predicted(kind, prompt):
    worker = begin(kind)
    assert not only(worker.tell(ask(prompt, max_tokens=5, ignore_eos=True)), Predict)
    assert offered(worker.later()) == [LengthRange(low=5, high=6)]
    worker.core.stepping = False
    assert not update_length(worker.tell(StepDone(spans=(Span(KEY, 0, min(prompt, 8)),), estimates=(told(),))))
    assert (status(worker).predicted, status(worker).late) == (0, 0)


@pytest.mark.parametrize("kind", ["prior", "hidden", "classifier", "both"])
def test_what_is_not_decoded_is_not_predicted_either(kind):
    worker = begin(kind)
    assert not only(worker.tell(ask(6, max_tokens=1)), Predict)
    assert not sent(worker.step(("a", 7, "length")), "d1") and not status(worker).late


def test_one_that_waits_for_slots_is_offered_though_no_chunk_has_it():
    """Else it would wait for a step that waits for its grant."""
    worker = begin("hidden", slots=4)
    worker.tell(ask(8))
    assert offered(worker.later()) == [PRIOR]
    assert worker.core.prefill.short and not worker.core.prefill.expected


# ---------------------------------------------------------------- until when it waits


def test_the_answer_that_comes_in_time_is_what_it_is_offered_with():
    worker = begin("classifier")
    worker.tell(ask(12), named())
    assert offered(worker.later()) == [NAMED] and status(worker).predicted == 1


def test_an_answer_that_comes_after_the_start_ends_the_wait():
    worker = begin("classifier")
    worker.tell(ask(12))
    assert not offered(worker.step())
    assert offered(worker.tell(named())) == [NAMED] and status(worker).late == 0


def test_nobody_waits_longer_than_is_set():
    worker = begin("classifier", **learnt("classifier", wait_s=0.5))
    worker.tell(ask(12))
    worker.step()
    assert not offered(worker.later(0.49))
    worker.core.stepping = False
    assert offered(worker.later(0.02)) == [PRIOR] and status(worker).late == 1


@pytest.mark.parametrize("kind", ["classifier", "both", "hidden"])
@pytest.mark.parametrize("prompt", [6, 12])
def test_the_last_chunk_ends_the_wait(kind, prompt):
    """One of several chunks does not wait for its own state, and so is not late without it."""
    worker = begin(kind)
    worker.tell(ask(prompt))
    actions = worker.step() if prompt > 8 else []
    actions += worker.step(ENDS)
    waited = kind != "hidden" or prompt == 6
    assert offered(actions) == [PRIOR] and status(worker).late == waited
    if prompt == 6:
        said = kinds(actions)
        assert said.index("Tokens > broker") < said.index("Offer > d1") < said.index("Chunk > d1")


def test_when_nobody_can_say_nobody_waits():
    worker = begin("classifier")
    worker.tell(ask(12))
    worker.step()
    assert offered(worker.tell(LengthKnown(KEY, None))) == [PRIOR] and status(worker).late == 1


def test_a_range_is_taken_as_it_is():
    worker = begin("classifier")
    worker.tell(ask(12), LengthKnown(KEY, LengthRange(low=3, high=5)))
    assert offered(worker.later()) == [LengthRange(low=3, high=5)]


def test_without_what_was_learnt_the_last_chunk_ends_the_wait_too():
    worker = start(rules=Rules(length="noisy", decode_route="first_fit"))
    worker.tell(assign("a", prompt=6))
    assert offered(worker.step(ENDS)) == [None] and worker.core.prefill.lengths.late == 1
    assert not worker.tell(LengthKnown(KEY, NAMED))  # of no use any more
    assert worker.core.prefill.requests[KEY].length is None


def test_a_prompt_that_was_to_be_one_chunk_and_is_not_waits_no_longer():
    """Memory was short in the step: the engine ran less of it than planned."""
    worker = test_mixed.start(role="prefill", others=[("d1", "decode")], **learnt("hidden"))
    running = test_mixed.decoding(worker)
    worker.tell(ask(6))
    assert not offered(worker.later())
    actions = worker.tell(StepDone((Span(KEY, 0, 3),), preempted=(running,)))
    assert offered(actions) == [PRIOR] and status(worker).late == 0


def test_an_answer_while_the_engine_computes_is_heard():
    worker = begin("classifier")
    worker.tell(ask(12))
    worker.later()
    assert worker.core.stepping and offered(worker.tell(named())) == [NAMED]


def test_one_that_its_first_token_ends_was_not_late():
    worker = begin("classifier")
    worker.tell(ask(6))
    assert not sent(worker.step(("a", 7, "stop")), "d1") and status(worker).late == 0
    assert not worker.tell(named()) and status(worker).predicted == 1


def test_who_has_its_answer_and_no_place_is_not_offered_by_the_timer_of_the_wait():
    worker = begin("classifier")
    worker.tell(view(9, d1=0), ask(12))
    worker.step()
    assert not worker.tell(named())
    assert not sent(worker.later(1.0), kind=Offer) and status(worker).late == 0


# ---------------------------------------------------------------- what comes later


def test_what_its_own_state_says_goes_with_the_offer_of_a_short_prompt():
    worker = begin("hidden")
    worker.tell(ask(6))
    said = worker.step(ENDS, estimates=[told()])
    assert offered(said) == [TOLD] and not update_length(said) and status(worker).predicted == 1
    assert isinstance(sent(said)[-1], Chunk) and status(worker).late == 0


@pytest.mark.parametrize("kind", ["hidden", "both"])
def test_what_its_own_state_says_goes_before_the_last_chunk_of_a_long_prompt(kind):
    worker = begin(kind)
    worker.tell(ask(12), *[named()] * (kind == "both"))
    assert offered(worker.step()) == [PRIOR if kind == "hidden" else NAMED]
    said = worker.step(ENDS, estimates=[told()])
    messages = sent(said, "d1")
    assert [type(message) for message in messages] == [LengthUpdate, Chunk] and messages[1].token == 7
    assert update_length(said) == [TOLD] and worker.core.prefill.requests[KEY].length == TOLD


@pytest.mark.parametrize("prompt", [6, 12])
def test_after_its_own_state_the_classifier_is_not_heard(prompt):
    worker = begin("both")
    worker.tell(ask(prompt))
    if prompt > 8:
        worker.step()
    assert offered(worker.step(ENDS, estimates=[told()])) == [TOLD]
    assert not worker.tell(named()) and worker.core.prefill.requests[KEY].length == TOLD


def test_an_answer_that_comes_too_late_corrects():
    worker = begin("classifier")
    worker.tell(ask(6))
    worker.step(ENDS)
    (message,) = sent(worker.tell(named()))
    assert message == LengthUpdate(src="p1", incarnation=1, rid="a", attempt=1, offer=1, length=NAMED)
    assert offered(worker.later(1.0)) == [NAMED]  # the Offer is repeated, as it is now


def test_who_was_granted_and_has_all_its_kv_is_corrected_too():
    worker = begin("classifier")
    worker.tell(ask(6))
    worker.step(ENDS)
    worker.tell(grant("a"))
    assert update_length(worker.tell(named())) == [NAMED]


def test_the_same_again_is_not_said():
    worker = begin("both")
    worker.tell(ask(12), named())
    worker.step()
    assert not update_length(worker.step(ENDS, estimates=[told(1)]))


def test_who_is_on_offer_nowhere_is_offered_with_what_is_known_then():
    worker = begin("classifier")
    worker.tell(ask(6))
    worker.step(ENDS)
    worker.tell(refuse("a"))
    assert not worker.tell(named())
    assert offered(worker.tell(view(9, d1=9))) == [NAMED]


def test_who_is_handed_over_by_then_is_corrected_there():
    worker = begin("classifier")
    worker.tell(ask(6))
    worker.step(ENDS)
    worker.tell(Close(rid="a", attempt=1))
    (message,) = sent(worker.tell(named()))
    assert message == LengthUpdate(src="p1", incarnation=1, rid="a", attempt=1, offer=1, length=NAMED)
    assert not worker.tell(named()), "it is said once"
    worker.tell(Close(rid="a", attempt=1, outputs=5, reason="stop"))
    assert (status(worker).predicted, status(worker).scored, status(worker).late) == (1, 1, 1)


@pytest.mark.parametrize(
    ("kind", "answers", "closes"),
    [
        ("classifier", [], [{"reason": "stop", "outputs": 3}]),
        ("classifier", [], [{}, {"reason": "stop", "outputs": 3}]),
        ("classifier", [], [{"reason": "cancelled"}]),
        ("classifier", [named()], [{}]),  # it is the second one
        ("both", [], [{}]),  # its hidden state has said more
    ],
)
def test_what_comes_when_it_is_over_or_known_is_not_heard(kind, answers, closes):
    worker = begin(kind)
    worker.tell(ask(6), *answers)
    worker.step(ENDS, estimates=[told()] if kind == "both" else [])
    worker.tell(*(Close(rid="a", attempt=1, **close) for close in closes))
    assert not worker.tell(named())


def test_of_those_that_were_handed_over_the_newest_are_remembered(monkeypatch):
    monkeypatch.setattr(lengths, "MOST_PARTED", 2)
    worker = begin("classifier")
    for rid in ("a", "b", "c"):
        worker.tell(ask(2, rid))
        worker.step((rid, 7, None))
        worker.tell(Close(rid=rid, attempt=1))
    assert not worker.tell(named(key="p:a:1"))
    assert update_length(worker.tell(named(key="p:b:1"), named(key="p:c:1"))) == [NAMED, NAMED]


def test_one_that_its_first_token_ends_was_predicted_and_is_offered_to_nobody():
    worker = begin("hidden")
    worker.tell(ask(6))
    said = worker.step(("a", 7, "stop"), estimates=[told()])
    assert not sent(said, "d1") and len(sent(said, BROKER, Tokens)) == 1 and status(worker).predicted == 1


def test_another_attempt_goes_on_from_its_output():
    worker = begin("both")
    worker.tell(Assign(rid="a", attempt=2, prompt=[1] * 2, output=[5] * 9, sampling=Sampling(max_tokens=MOST)))
    worker.tell(named(1, "p:a:2"))  # fewer than it has by now
    (before,) = offered(worker.later())
    assert before.high > 10
    worker.tell(StepDone((Span("p:a:2", 0, 8),)))
    worker.later()
    spans = (Span("p:a:2", 8, 11),)
    actions = worker.tell(StepDone(spans, estimates=(told(1, "p:a:2", outputs=9),)))
    assert update_length(actions) == [tokens(12)]  # 9 and four to seven more are mostly in that bucket


def test_at_home_a_correction_is_heard_at_once():
    worker = test_mixed.start(**learnt("classifier"))
    worker.tell(ask(12))
    worker.step()
    worker.step()
    (request,) = worker.core.decode.requests.values()
    assert request.length == PRIOR
    assert not sent(worker.tell(named()))
    assert request.length == NAMED


def decode_step(worker, key, bucket, outputs, reason=None):
    worker.later()
    odd = told(bucket, key, outputs)
    worker.tell(StepDone((Span(key, 50, 51),), (Sampled(key, (6,), reason),), estimates=(odd,)))


def test_what_is_said_during_decode_goes_to_the_decode_half():
    worker = test_mixed.start(role="decode", **learnt("hidden"))
    key = test_mixed.decoding(worker)
    request = worker.core.decode.requests[key]
    decode_step(worker, key, bucket=1, outputs=request.written)
    assert (request.length, request.written) == (tokens(4), 3)  # two and 4 to 7 more
    worker.tell(LengthUpdate(src="p9", incarnation=1, rid="x", attempt=1, offer=9, length=PRIOR))
    assert request.length == tokens(4)  # the prefill side knows less


def test_what_is_said_in_the_very_step_that_ends_it_is_judged():
    """Or only those would be judged that went on after what was said."""
    worker = test_mixed.start(role="decode", **learnt("hidden"))
    for number in range(8):  # of so many one is judged
        key = test_mixed.decoding(worker, f"x{number}", number=20 + number)
        decode_step(worker, key, bucket=0, outputs=2, reason="stop")
    assert (status(worker).predicted, status(worker).scored) == (1, 1)


# ---------------------------------------------------------------- ends, and what is said of it


def ended(*closes):
    worker = begin("hidden")
    worker.tell(ask(6))
    worker.step(ENDS, estimates=[told()])
    worker.tell(*(Close(rid="a", attempt=1, **close) for close in closes))
    return worker


@pytest.mark.parametrize(
    ("closes", "scored"),
    [
        ([{"reason": "stop", "outputs": 13}], 1),
        ([{"reason": "stop", "outputs": 13}] * 2, 1),
        ([{}, {"reason": "stop", "outputs": 13}], 1),  # handed over, then over
        ([{"reason": "cancelled"}], 0),
        ([{"reason": "cancelled"}, {"reason": "stop", "outputs": 13}], 0),
        ([{"reason": "length"}], 0),  # which its sampling fixed
        ([{}], 0),
    ],
)
def test_what_was_said_is_held_against_what_came(closes, scored):
    found = status(ended(*closes))
    assert (found.predicted, found.scored, found.right, found.inside) == (1, scored, scored, scored)


def test_the_beat_says_how_the_predictor_does():
    worker = ended({"reason": "stop", "outputs": 13})
    assert worker.core.reporter.heartbeat().message.predictor == status(worker)
    assert (status(worker).kind, status(worker).note) == ("hidden", "made for a test")
    assert start().core.reporter.heartbeat().message.predictor is None


def test_what_ends_elsewhere_teaches_the_prior():
    worker = begin("prior")
    for number in range(300):
        worker.tell(Close(rid=f"r{number}", attempt=1, reason="stop", outputs=2))
    worker.tell(ask(6))
    assert offered(worker.later()) == [tokens(0)]


def test_an_end_is_counted_once_though_both_halves_hear_of_it():
    worker = test_mixed.start(**learnt("hidden"))
    key = test_mixed.decoding(worker)
    worker.step(reason="stop")
    assert key not in worker.core.decode.batch.running
    before = repr(vars(worker.core.estimator.prior))
    worker.tell(Close(rid="x", attempt=1, reason="stop", outputs=3))
    assert repr(vars(worker.core.estimator.prior)) == before


def test_to_learn_one_must_know_from_what():
    with pytest.raises(ValueError, match='p1: length = "trained" needs'):
        Worker(identity("p1", "prefill", rules=Rules(length="trained")), Random(1), now=0.0)


def test_a_correction_that_comes_before_its_sender_is_known_waits_with_its_offer():
    worker = test_mixed.start(role="decode", **learnt("prior"))
    of = {"src": "p7", "incarnation": 3, "attempt": 1, "offer": 1}
    assert not worker.tell(offer("x", 8, length=PRIOR, **of), LengthUpdate(rid="x", length=NAMED, **of))
    worker.tell(membership(2, instance("m1", "decode"), instance("p7", "prefill", incarnation=3)))
    (request,) = worker.core.decode.requests.values()
    assert request.length == NAMED
