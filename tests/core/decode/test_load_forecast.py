"""What the requests at a decode instance are predicted to take, and what better predictions change that come while they
are here. The prior, of buckets of 10 tokens: nearly all are short, but who gets past 20 goes on to 40 or 50."""

import pytest

from tests.core.build import capacity, close, decode_request, identity, offer, update_length
from tests.core.driver import working
from tetri.core.actions import Broken, Step
from tetri.core.decode.load_forecast import LEARNED, LoadForecast
from tetri.cost import CorrectedCost, Cost
from tetri.policy.rules import Rules
from tetri.request import Expected, LengthDistribution, LengthRange, Sampling

COST = Cost(decode=((1.0, 0.01), (11.0, 0.11)), decode_context_s=0.001)
LARGE = capacity(blocks=60, context=200, max_batch=4)
LONG = {"sampling": Sampling(max_tokens=60)}


def span(low, high):
    return LengthRange(low=low, high=high)


def forecast(**rules):
    rules = Rules(**{"heavy_tokens": 10, **rules})
    own = identity("d1", "decode", rules=rules, cost=COST, capacity=capacity(max_batch=2))
    return LoadForecast(own, CorrectedCost(COST))


def request(rid, low=None, high=None, prompt=8, output=(), most=40):
    return decode_request(offer(rid, prompt, output, most, length=None if low is None else span(low, high)))


def write(view, made, tokens):
    made.tokens += [1] * tokens
    view.wrote(tokens)


@pytest.mark.parametrize(
    "rules, length, ends",
    [
        ({"dispatch_end": "low", "admit_end": "high"}, (10, 20), (10, 19)),
        ({"dispatch_end": "middle", "admit_end": "low"}, (10, 20), (14, 10)),
        ({}, (None, None), (40, 40)),  # not predicted
        ({"dispatch_end": "low", "admit_end": "low"}, (0, 9), (8, 1)),  # at least two: the first, and one decoded
    ],
)
def test_the_ends_of_the_range_that_the_rules_name(rules, length, ends):
    view, made = forecast(**rules), request("a", *length)
    view.enter(made)
    assert (made.dispatch_end, made.admit_end) == ends


def test_a_range_that_is_outlived_moves_up_and_may_turn_heavy():
    view, made = forecast(), request("a", 4, 8)
    view.enter(made)
    assert (made.due, view.until_moved(made), made.heavy) == (1, 8, False)  # its account has room for the prompt only
    write(view, made, 6)
    assert not view.look(made) and made.length == span(4, 8)
    write(view, made, 1)
    assert not view.look(made) and made.dispatch_end == 8  # beyond the last token inside: by its end from now on
    write(view, made, 1)
    assert view.look(made) and made.length == span(8, 12) and view.until_moved(made) == 4
    write(view, made, 4)
    assert view.look(made) and made.heavy and view.heavy == 1
    view.check([made])


def test_output_of_earlier_attempts_counts():
    view, made = forecast(), request("a", 4, 8, prompt=6, output=[1] * 8)
    view.enter(made)
    assert made.length == span(8, 12) and made.dispatch_end == 11 and made.due == 3


def test_seconds_until_all_have_ended():
    """Three of 6, 6 and 12 tokens left in a batch of two: twelve steps with two thirds of the context."""
    view = forecast()
    assert view.decode_s() == 0.0
    for rid, end in (("a", 6), ("b", 6), ("c", 12)):
        view.enter(request(rid, 1, end + 1))
    assert view.decode_s() == pytest.approx(COST.decode_run_s(2, 16, 12))


def test_check_finds_what_is_wrong():
    view, made = forecast(), request("a", 2, 4)
    view.enter(made)
    with pytest.raises(Broken, match="counted"):
        view.check([])
    write(view, made, 3)
    with pytest.raises(Broken, match="a has outlived its prediction of 3 tokens"):
        view.check([made])


STEP_S = 1e-4  # a pass, whatever runs
PRIOR = LengthDistribution(10, (0.6, 0.25, 0.01, 0.01, 0.12, 0.01))


def learning(interval=1, **changes):
    rules = Rules(length="trained", length_granularity=10, heavy_tokens=25)
    cost, expected = Cost(decode=((1.0, STEP_S), (4.0, STEP_S))), Expected("hidden", PRIOR)
    fields = {"rules": rules, "expected": expected, "cost": cost, "capacity": LARGE, "reserve_share": 1.0}
    return working("d1", "p1", "p2", stream_interval=interval, **{**fields, **changes})


def landed(low, high, steps=0, interval=1, **changes):
    """`r` has its first token, and one of each step."""
    told = learning(interval, **changes)
    told.land(length=span(low, high), **LONG)
    for _ in range(steps):
        told.step()
    return told


def left(told):
    """Tokens that `r` is predicted to write yet."""
    return round(told.load().decode_s / STEP_S, 6)


def sure(label):
    return LengthDistribution(10, (*[0.0] * label, 1.0, 0.0))


@pytest.mark.parametrize(
    "was, steps, event, high",
    [
        (span(40, 50), 2, update_length("r", span(10, 20)), 20),  # shorter after all
        (span(40, 50), 25, update_length("r", span(10, 20)), 50),  # outlived already: as those who went on as far
        (span(0, 10), 0, update_length("r", span(40, 50), offer=2), 10),  # of another offer
        (span(0, 10), 0, update_length("r", span(40, 50), src="p2"), 10),
        (span(0, 10), 0, update_length("r", span(40, 50), attempt=2), 10),
        (span(0, 10), 0, update_length("x", span(40, 50)), 10),
    ],
)
def test_only_what_is_said_of_its_own_offer_replaces_its_range(was, steps, event, high):
    told = landed(was.low, was.high, steps)
    told.tell(event)
    assert left(told) == high - 1 - (1 + steps) and told.load().heavy == (high > 30)


@pytest.mark.parametrize("number", [1, 2])
def test_an_offer_that_is_sent_again_brings_the_range_of_a_lost_correction(number):
    told = landed(0, 10)
    for _ in range(2):
        told.tell(offer("r", 8, offer=number, length=span(40, 50), **LONG))
        assert left(told) == 49 - 1
    told.step()
    told.step(estimates={"r": sure(1)})
    told.tell(offer("r", 8, offer=3, length=span(50, 60), **LONG))
    assert left(told) == 19 - 3  # its own hidden state knows more


@pytest.mark.parametrize("late", [update_length("r", span(40, 50)), offer("r", 8, length=span(40, 50), **LONG)])
def test_what_comes_after_the_end_changes_nothing(late):
    told = landed(0, 10)
    told.step(r="stop")
    told.tell(late)
    load = told.load()
    assert (load.decode_s, load.growth_blocks, load.heavy) == (0.0, 0, 0)


def test_a_run_of_several_passes_ends_where_the_new_range_does():
    told = landed(40, 50, interval=50)
    told.step(passes=2)
    told.tell(update_length("r", span(10, 20)))
    assert told.later()[-1] == Step(20 - 3)


def test_what_follows_is_added_to_what_is_written():
    told = landed(0, 10, steps=4)
    told.step(estimates={"r": sure(3)})
    assert left(told) == 39 - 6 and told.load().heavy == 1
    told.tell(update_length("r", span(0, 10)))  # said before, come late
    assert left(told) == 39 - 6
    told.step(estimates={"r": sure(0)})
    assert left(told) == 19 - 7 and told.load().heavy == 0  # 7 to 15 in all, so rather from 10 on


def test_in_a_run_of_several_passes_what_is_written_meanwhile_counts():
    told = landed(40, 60, interval=50)
    told.step(passes=25, estimates={"r": sure(0)})  # one and 10 more at most, and it has 26 in the end
    assert told.later()[-1] == Step(50 - 26)


def test_of_one_that_ends_in_the_same_step_it_is_only_judged():
    """Or only those would be judged that went on after what was said."""
    told = learning()
    for number in range(8):  # one of them is the one whose first re-estimate is scored
        told.land(f"r{number}", **LONG)
        told.step(estimates={f"r{number}": sure(0)}, **{f"r{number}": "stop"})
    status = told.heartbeat().predictor
    assert (status.predicted, status.scored, status.right) == (1, 1, 1) and told.load().decode_s == 0.0


def test_who_outlives_its_range_has_as_much_left_as_those_who_went_on_as_far():
    told = landed(10, 20, steps=18)
    assert left(told) == 1  # the end of its range
    told.step()
    assert left(told) == 49 - 20 and told.load().heavy == 1


def test_with_nothing_to_learn_from_it_is_the_next_range():
    told = landed(10, 20, interval=50, rules=Rules(length="noisy"), expected=None)
    told.step(passes=19)
    assert left(told) == 29 - 20


@pytest.mark.parametrize(
    "ends, ignore_eos, over, high",
    [
        ("stop", False, [], 30),
        ("length", True, [{"reason": "length"}], 50),
        (None, False, [{"reason": "cancelled"}], 50),
        (None, False, [{}], 50),
        (None, False, [{"reason": "stop", "outputs": 25}], 30),  # at a stop text, which only the broker knows of
    ],
)
def test_an_end_that_tells_of_lengths_teaches(ends, ignore_eos, over, high):
    """Of those that get past 20 tokens forty end with 25 tokens, as far as anything can be learnt from that."""
    told = learning(interval=60)
    for number in range(40):
        rid = f"r{number}"
        told.land(rid, number=number, sampling=Sampling(max_tokens=60, ignore_eos=ignore_eos))
        told.step(passes=24, **{rid: ends} if ends else {})
        told.tell(*(close(rid, **said) for said in over))
    told.land(length=span(10, 20), number=99, **LONG)
    told.step(passes=19)
    assert left(told) == high - 1 - 20


def test_how_long_outputs_usually_are_and_steps_take():
    view = forecast()
    assert (view.usual_output, view.step_s()) == (0.0, 0.0)
    view.learn(10)
    assert view.usual_output == 10.0
    view.learn(30)
    assert (view.ended, view.ended_tokens) == (2, 40)
    assert view.usual_output == pytest.approx(10 + LEARNED * 20)
    for rid in ("a", "b", "c"):
        view.enter(request(rid))
    assert view.step_s() == pytest.approx(COST.decode_s(3, 3 * 8))  # also those that do not run yet
    view.cost.correct(1.0, 2.0)
    assert view.step_s() == pytest.approx(2 * COST.decode_s(3, 3 * 8))
