"""What the decode half makes of better predictions that come while a request is here, and what it learns.

The prior, of buckets of 10 tokens: nearly all are short, but who gets past 20 goes on to 40 or 50."""

import pytest

from tests.core.build import Told, chunk, offer
from tests.core.test_batch import LARGE, LONG, Asked, run
from tests.core.test_decode import decode_key, start
from tetri.core.actions import AdmitRequest, Step
from tetri.cost import Cost
from tetri.engine_request import HiddenStateEstimate, Sampled, Span, StepDone
from tetri.policy import rules as tables
from tetri.policy.rules import Rules
from tetri.request import Expected, LengthDistribution, LengthRange, Sampling
from tetri.wire.handover import LengthUpdate
from tetri.wire.messages import Close

PRIOR = LengthDistribution(10, (0.6, 0.25, 0.01, 0.01, 0.12, 0.01))
STEP_S = 1e-4
COST = Cost(decode=((1.0, STEP_S), (4.0, STEP_S)))


def learning(interval=1, **rules):
    own = Rules(**{"length": "trained", "length_granularity": 10, "heavy_tokens": 25, **rules})
    return start(
        stream_interval=interval,
        capacity=LARGE,
        reserve_share=1.0,
        rules=own,
        expected=Expected("hidden", PRIOR),
        cost=COST,
    )


def tokens(low, high):
    return LengthRange(low=low, high=high)


def sure(label):
    return LengthDistribution(10, (*[0.0] * label, 1.0, 0.0))


def update_length(rid, length, number=1, **changes):
    fields = {"src": "p1", "incarnation": 1, "attempt": 1, "offer": number, **changes}
    return LengthUpdate(rid=rid, length=length, **fields)


def request(told, rid="r", number=1):
    return told.core.decode.requests[decode_key(rid, number)]


def walk(told, steps):
    for _ in range(steps):
        run(told, 1)


def estimate(told, outputs, label, steps=1, rid="r", reason=None):
    """A step in which its hidden state says that it ends in so many tens of tokens more."""
    key = decode_key(rid)
    assert isinstance(told.later()[-1], Step)
    told.tell(
        StepDone(
            spans=(Span(key, 90, 90 + steps),),
            tokens=(Sampled(key, (7,) * steps, reason),),
            steps=steps,
            estimates=(HiddenStateEstimate(key, outputs, sure(label)),),
        )
    )
    told.core.check()


# ---------------------------------------------------------------- the prefill side knows more


@pytest.mark.parametrize("stage", ["moving", "landed", "running"])
def test_a_better_range_replaces_the_one_of_the_offer(stage):
    told = learning()
    if stage == "moving":
        told.tell(offer("r", 8, sampling=LONG, length=tokens(0, 10)))
    else:
        told.land("r", sampling=LONG, length=tokens(0, 10))
    if stage == "running":
        walk(told, 2)
    load = told.core.reporter.load()
    assert not told.tell(update_length("r", tokens(40, 50)))
    told.core.check()
    now = told.core.reporter.load()
    assert request(told).length == tokens(40, 50) and request(told).dispatch_end == 49
    assert (load.heavy, now.heavy) == (0, 1)
    assert now.growth_blocks == load.growth_blocks + 10 and now.decode_s == pytest.approx(load.decode_s + 40 * STEP_S)


def test_a_range_that_is_shorter_after_all():
    told = learning()
    told.land("r", sampling=LONG, length=tokens(40, 50))
    walk(told, 2)
    told.tell(update_length("r", tokens(10, 20)))
    told.core.check()
    assert told.core.reporter.load().heavy == 0 and request(told).length == tokens(10, 20)


def test_a_range_that_it_has_outlived_already_is_the_survivors():
    told = learning()
    told.land("r", sampling=LONG, length=tokens(40, 50))
    walk(told, 25)
    told.tell(update_length("r", tokens(10, 20)))
    told.core.check()
    assert request(told).length == tokens(40, 50)


@pytest.mark.parametrize("other", [{"rid": "x"}, {"number": 2}, {"src": "p2"}, {"attempt": 2}])
def test_what_is_said_of_another_offer_changes_nothing(other):
    told = learning()
    told.land("r", sampling=LONG, length=tokens(0, 10))
    assert not told.tell(update_length(**{"rid": "r", "length": tokens(40, 50), **other}))
    assert request(told).length == tokens(0, 10)


@pytest.mark.parametrize("number", [1, 2])
def test_an_offer_that_is_sent_again_brings_the_range_of_a_lost_foreseen(number):
    told = learning()
    told.land("r", sampling=LONG, length=tokens(0, 10))
    for _ in range(2):
        told.tell(offer("r", 8, offer=number, sampling=LONG, length=tokens(40, 50)))
        assert request(told).length == tokens(40, 50) and request(told).offer.offer == number
    walk(told, 1)
    estimate(told, 2, label=1)
    told.tell(offer("r", 8, offer=3, sampling=LONG, length=tokens(50, 60)))
    assert request(told).length == tokens(10, 20) and request(told).estimates


def test_an_offer_again_after_the_end_changes_nothing():
    told = learning()
    told.land("r", sampling=LONG, length=tokens(0, 10))
    run(told, 1, (decode_key("r"), 1, "stop"))
    told.tell(offer("r", 8, sampling=LONG, length=tokens(40, 50)))
    assert request(told).length == tokens(0, 10)


def test_what_comes_after_the_end_changes_nothing():
    told = learning()
    told.land("r", sampling=LONG, length=tokens(0, 10))
    run(told, 1, (decode_key("r"), 1, "stop"))
    assert not told.tell(update_length("r", tokens(40, 50)))
    told.core.check()


def test_a_run_of_several_passes_ends_where_the_new_range_does():
    told = learning(interval=50)
    told.land("r", sampling=LONG, length=tokens(40, 50))
    run(told, 2)
    told.tell(update_length("r", tokens(10, 20)))
    assert told.later()[-1] == Step(20 - 3)


def test_the_admission_policy_is_asked_again_when_a_range_has_changed(monkeypatch):
    policy = Asked()
    monkeypatch.setitem(tables.ADMISSIONS, "asked", policy)
    told = learning(admit="asked")
    told.land("r", sampling=LONG, length=tokens(40, 50))
    run(told, 1)
    told.tell(offer("w", 8, offer=2, sampling=LONG, length=tokens(0, 10)))
    told.later()
    told.tell(StepDone(spans=(Span(decode_key("r"), 90, 91),), allocated=(decode_key("w", 2),)))
    told.tell(chunk("w", 0, 0, 2, token=5, offer=2))
    run(told, 1)
    before = len(policy.calls)
    run(told, 1)
    assert len(policy.calls) == before
    told.tell(update_length("r", tokens(0, 10)))
    policy.answer = [decode_key("w", 2)]
    assert [action for action in told.later() if isinstance(action, AdmitRequest)]
    ((_, batch),) = policy.calls[before:]
    assert [member.end for member in batch.running] == [8 + 9]


# ---------------------------------------------------------------- its own hidden state


def test_what_follows_is_added_to_what_is_written():
    told = learning()
    told.land("r", sampling=LONG, length=tokens(0, 10))
    walk(told, 4)
    estimate(told, 5, label=3)
    assert request(told).length == tokens(30, 40) and told.core.reporter.load().heavy == 1
    told.tell(update_length("r", tokens(0, 10)))  # said before, come late
    assert request(told).length == tokens(30, 40)
    estimate(told, 6, label=0)
    assert request(told).length == tokens(10, 20)  # 7 to 15, so rather from 10 on
    assert told.core.reporter.load().heavy == 0


def test_in_a_run_of_several_passes_what_is_written_meanwhile_counts():
    told = learning(interval=50)
    told.land("r", sampling=LONG, length=tokens(40, 60))
    estimate(told, 3, label=0, steps=25)  # 3 + 10 at most, and it has 26 in the end
    assert request(told).written == 26 and request(told).length == tokens(40, 50)
    assert told.later()[-1] == Step(50 - 26)


def test_of_one_that_ends_in_the_same_step_it_is_only_judged():
    told = learning()
    for number in range(8):  # one of them is the one whose first re-estimate is scored
        rid = f"r{number}"
        told.land(rid, number=1, sampling=LONG)
        estimate(told, 1, label=0, rid=rid, reason="stop")
    status = told.core.estimator.status()
    assert (status.predicted, status.scored, status.right) == (1, 1, 1)
    assert told.core.decode.forecast.requests == 0


def test_a_fixed_length_is_not_foretold():
    told = learning()
    fixed = Sampling(max_tokens=30, ignore_eos=True)
    told.land("r", sampling=fixed, length=tokens(30, 31))
    estimate(told, 1, label=1)
    assert request(told).length == tokens(30, 31)


# ---------------------------------------------------------------- the survivors


def test_who_outlives_its_range_has_as_much_left_as_those_who_went_on_as_far():
    told = learning()
    told.land("r", sampling=LONG, length=tokens(10, 20))
    walk(told, 18)
    assert request(told).length == tokens(10, 20)
    run(told, 1)
    told.core.check()
    assert request(told).written == 20 and request(told).length == tokens(40, 50)
    assert told.core.reporter.load().heavy == 1


def test_with_nothing_to_learn_from_it_is_the_next_range():
    told = start(capacity=LARGE, reserve_share=1.0, rules=Rules(length="noisy"), stream_interval=50)
    told.land("r", sampling=LONG, length=tokens(10, 20))
    run(told, 19)
    assert request(told).length == tokens(20, 30)


def test_past_all_that_is_known_it_is_cut_off_in_the_end():
    told = learning(interval=60)
    told.land("r", sampling=LONG, length=tokens(40, 50))
    run(told, 49)
    told.core.check()
    assert request(told).length.high <= 61 and request(told).length.high > 50


# ---------------------------------------------------------------- learning


def shares(told: Told):
    return told.core.estimator.prior.curve(0, 0, 60)


def test_a_natural_end_teaches_once():
    told, twin = learning(), learning()
    told.land("r", sampling=LONG)
    run(told, 1, (decode_key("r"), 1, "stop"))
    told.tell(Close(rid="r", attempt=1, outputs=2, reason="stop"))
    twin.core.estimator.ended("r", 2, "stop")
    for view in (told, twin):
        for number in range(200):  # so that the table is counted again
            view.core.estimator.ended(str(number), 15, "stop")
    assert shares(told) == shares(twin)


@pytest.mark.parametrize(
    "sampling, close",
    [
        (Sampling(max_tokens=60, ignore_eos=True), Close(rid="r", attempt=1, reason="length")),
        (LONG, Close(rid="r", attempt=1, reason="cancelled")),
        (LONG, Close(rid="r", attempt=1)),
    ],
)
def test_an_end_that_says_nothing_of_lengths_teaches_nothing(sampling, close):
    told, twin = learning(), learning()
    told.land("r", sampling=sampling)
    if sampling.ignore_eos:
        run(told, 1, (decode_key("r"), 1, "length"))
    told.tell(close)
    for view in (told, twin):
        for number in range(200):
            view.core.estimator.ended(str(number), 15, "stop")
    assert shares(told) == shares(twin)


def test_an_end_that_only_the_broker_knows_of_teaches():
    """At a stop text, say."""
    told = learning()
    for number in range(1, 100):
        told.land(f"r{number}", number=number, sampling=LONG)
        told.tell(Close(rid=f"r{number}", attempt=1, outputs=15, reason="stop"))
    assert shares(told).below[1] < 0.5  # those below 10 tokens were 0.6 before
