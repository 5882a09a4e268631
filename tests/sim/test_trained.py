"""The simulator with recorded texts: they end by themselves, and what predictors said of them reaches the cores."""

from dataclasses import replace
from random import Random

import pytest

from tetri.cost import Cost
from tetri.policy.rules import Rules
from tetri.request import Expected, LengthDistribution
from tetri.sim.setup import Setup, SimError
from tetri.sim.texts import RecordedText
from tetri.sim.traces import Arrival, resampled
from tetri.sim.world import World

COST = Cost(prefill=((1.0, 0.02), (512.0, 0.1)), decode=((1.0, 0.02), (64.0, 0.06)), kv_token_bytes=1000)
SETUP = Setup(COST, prefill=2, decode=2, kv_tokens=8000, chunk_tokens=300, max_batch=64)
WIDTH, BUCKETS = 50, 11


def sure(tokens):
    """Odds that name the right bucket."""
    label = min(tokens // WIDTH, BUCKETS - 1)
    return LengthDistribution(WIDTH, tuple(0.9 if place == label else 0.01 for place in range(BUCKETS)))


def texts(count=40):
    rng, made = Random(7), []
    for _ in range(count):
        prompt, output = rng.randint(5, 400), rng.choice((rng.randint(2, 60), rng.randint(200, 450), 500))
        follows = tuple((known, sure(output - known)) for known in range(0, output, 64))
        made.append(RecordedText(prompt, output, 500, classifier=sure(output), follows=follows))
    return made


TEXTS = texts()
PRIOR = LengthDistribution(WIDTH, (1 / BUCKETS,) * BUCKETS)


def world(kind, requests=60, rate=6.0, seed=1, texts=TEXTS, **changes):
    rules = changes.pop("rules", Rules())
    trained = kind not in ("none", "oracle", "noisy")
    setup = replace(
        SETUP,
        rules=replace(rules, length="trained" if trained else kind),
        expected=Expected(kind, PRIOR) if trained else None,
        seed=seed,
        **changes,
    )
    return World(setup, resampled(requests, texts, seed, rate))


@pytest.mark.parametrize("kind", ["none", "prior", "classifier", "hidden", "both", "noisy", "oracle"])
@pytest.mark.parametrize("admit", ["greedy", "peak"])
def test_whatever_is_predicted_a_text_ends_where_it_ended(kind, admit):
    """`run` counts all tokens, blocks and ends."""
    made = world(kind, rules=Rules(admit=admit), kv_tokens=2500).run()
    assert [each.state for each in made.outcomes] == ["done"] * 60
    assert made.counters["decode_tokens"] >= sum(each.arrival.output - 1 for each in made.outcomes)


def test_the_same_seed_gives_the_same_run():
    first, again, other = (world("both", seed=seed, rules=Rules(length_cover=0.8)).run() for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("admit", ["greedy", "reserve_static", "reserve_dynamic", "peak"])
def test_who_is_told_the_truth_does_as_when_requests_fix_their_lengths(admit):
    """Where a request asks for just so many tokens, the oracle reads that; else the record."""
    rules, longer = Rules(length="oracle", admit=admit), [text for text in TEXTS if text.output > 1]
    setup = replace(SETUP, rules=rules, kv_tokens=2500)
    drawn = list(resampled(60, longer, 1, 6.0))
    fixed = [Arrival(each.at_s, each.prompt, each.output) for each in drawn]
    new, old = World(setup, drawn).run(), World(setup, fixed).run()
    assert [(e.ttft_s, e.jct_s, e.decode, e.preempted) for e in new.outcomes] == [
        (e.ttft_s, e.jct_s, e.decode, e.preempted) for e in old.outcomes
    ]


@pytest.mark.parametrize("kind", ["classifier", "hidden", "both", "prior"])
def test_the_record_reaches_the_workers(kind):
    """With odds that are right, most ranges are, not the prior's. During decode only hidden states tell more."""
    made = world(kind)
    made.run()
    prefill, decode = (made.workers[name].core.estimator for name in ("p0", "d0"))
    status = prefill.status()
    assert (status.kind, status.on) == (kind, kind != "prior")
    if status.on:
        assert status.predicted == status.scored > 20
        assert status.right > 0.8 * status.scored > 2 * status.prior_right
    assert (decode.later.predicted > 0) == (kind in ("hidden", "both"))


def test_a_classifier_takes_its_time_and_the_hidden_state_none():
    slow = replace(COST, predictor_s=0.3, predictor_slowdown=2.0)
    plain, hidden, classifier = (world(kind, cost=slow).run().outcomes for kind in ("none", "hidden", "classifier"))
    assert [each.ttft_s for each in plain] == [each.ttft_s for each in hidden]
    assert sum(each.ttft_s for each in classifier) > sum(each.ttft_s for each in plain)


def test_what_is_not_recorded_is_one_line():
    bare = [replace(text, classifier=None) for text in TEXTS]
    with pytest.raises(SimError, match="no classifier prediction is recorded for a text of"):
        world("both", texts=bare).run()
    with pytest.raises(SimError, match="trained needs recorded predictions"):
        World(replace(SETUP, rules=Rules(length="trained")), resampled(5, TEXTS, 1))
