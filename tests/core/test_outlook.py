"""What the requests at a decode instance are predicted to take."""

import pytest

from tests.core.build import BLOCK, capacity, identity, offer
from tetri.core.actions import Broken
from tetri.core.decode.load_forecast import LoadForecast
from tetri.core.decode.request import NEVER, DecodeRequest, KVInflow
from tetri.cost import Cost
from tetri.policy.rules import Rules
from tetri.request import LengthRange, Sampling

COST = Cost(decode=((1.0, 0.01), (11.0, 0.11)), decode_context_s=0.001)


def forecast(**rules):
    rules = Rules(**{"heavy_tokens": 10, **rules})
    return LoadForecast(identity("d1", "decode", rules=rules, cost=COST, capacity=capacity(max_batch=2)))


def request(rid, low=None, high=None, prompt=8, output=(), most=40):
    length = None if low is None else LengthRange(low=low, high=high)
    made = offer(rid, prompt, output, sampling=Sampling(max_tokens=most))
    return DecodeRequest(rid, made, KVInflow(made.blocks, "shm", "s-p1"), length, blocks=made.blocks)


def write(view, made, tokens):
    made.tokens += [1] * tokens
    view.wrote(tokens)


def test_what_comes_and_goes_is_counted():
    view = forecast()
    one, two = request("a", 10, 20), request("b", 2, 4, prompt=4)
    for each in (one, two):
        view.enter(each)
        view.check([one, two][: view.requests])
    assert (view.requests, view.heavy, view.context) == (2, 1, 12)
    assert view.left == 19 + 3  # the last token inside each range
    assert (one.growth, two.growth, view.growth) == (-(-27 // BLOCK) - 2, 1, 5 + 1)
    write(view, one, 3)
    assert (view.left, view.context) == (19, 15)
    view.grown(one, 3)
    assert view.growth == 5
    view.leave(one)
    view.leave(two)
    assert (view.requests, view.heavy, view.growth, view.left, view.context) == (0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    "rules, length, ends",
    [
        ({"dispatch_end": "low", "admit_end": "high"}, (10, 20), (10, 19)),
        ({"dispatch_end": "middle", "admit_end": "low"}, (10, 20), (14, 10)),
        ({"admit_end": "low"}, (30, 90), (40, 30)),  # no more than max_tokens
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
    assert not view.look(made) and made.length == LengthRange(low=4, high=8)
    write(view, made, 1)
    assert not view.look(made) and made.dispatch_end == 8  # beyond the last token inside: by its end from now on
    write(view, made, 1)
    assert view.look(made) and made.length == LengthRange(low=8, high=12) and view.until_moved(made) == 4
    write(view, made, 4)
    assert view.look(made) and made.heavy and view.heavy == 1
    view.check([made])


def test_one_that_outlives_the_low_end_is_predicted_by_the_high_end():
    view, made = forecast(dispatch_end="low"), request("a", 5, 20)
    view.enter(made)
    write(view, made, 5)
    assert not view.look(made) and made.dispatch_end == 19
    view.check([made])


def test_output_of_earlier_attempts_counts():
    view, made = forecast(), request("a", 4, 8, prompt=6, output=[1] * 8)
    view.enter(made)
    assert made.length == LengthRange(low=8, high=12) and made.dispatch_end == 11 and made.due == 3


def test_one_without_a_range_is_never_moved():
    view, made = forecast(), request("a")
    view.enter(made)
    assert view.until_moved(made) == NEVER and not made.heavy


def test_seconds_until_all_have_ended():
    """Three seats of 6, 6 and 12 tokens left in a batch of two: twelve steps with two thirds of the context."""
    view = forecast()
    assert view.decode_s() == 0.0
    for rid, end in (("a", 6), ("b", 6), ("c", 12)):
        view.enter(request(rid, 1, end + 1))
    assert view.decode_s() == pytest.approx(COST.decode_run_s(2, 16, 12))


def test_check_finds_what_is_wrong():
    view, made = forecast(), request("a", 2, 4)
    view.enter(made)
    view.left += 1
    with pytest.raises(Broken, match="counted"):
        view.check([made])
    view.left -= 1
    write(view, made, 3)
    with pytest.raises(Broken, match="a has outlived its prediction of 3 tokens"):
        view.check([made])
