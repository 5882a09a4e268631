"""Which prefill instance a request goes to."""

from collections import Counter
from math import inf
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tetri.policy.route import IN_TIME, adaptive, drawn, least_loaded, random, round_robin
from tetri.policy.views import PrefillPool


def pool(*queued_s, last=-1, ttft_s=0.0):
    return adaptives(*[(each, 1.0, 0) for each in queued_s], last=last, ttft_s=ttft_s)


def adaptives(*columns, last=-1, ttft_s):
    """Columns of (queued_s, share, requests)."""
    queued_s, share, requests = (list(column) for column in zip(*columns, strict=True))
    return PrefillPool([f"a{place}" for place in range(len(columns))], queued_s, share, requests, ttft_s, last)


def test_the_least_loaded_and_the_first_of_equals_and_nobody_among_none():
    assert [route(1.0, PrefillPool(), Random(1)) for route in (least_loaded, random, round_robin)] == [None] * 3
    assert least_loaded(1.0, pool(3.0, 2.0, 2.0), Random(1)) == 1


def test_random_takes_each_as_often_and_never_leaves_the_pool():
    rng = Random(7)
    counts = Counter(random(1.0, pool(9.0, 0.0, 5.0), rng) for _ in range(3000))
    assert sorted(counts) == [0, 1, 2] and min(counts.values()) > 900

    class Highest(Random):
        def random(self):
            return 1 - 2**-53  # the largest that there is

    assert all(drawn(columns, Highest()) == columns - 1 for columns in range(1, 3000))


def test_round_robin_takes_the_one_after_the_last():
    assert [round_robin(1.0, pool(1.0, 2.0, 3.0, last=last), Random(1)) for last in (-1, 0, 2, 5)] == [0, 1, 0, 0]


@pytest.mark.parametrize("ttft_s", [100.0, inf, 2.0, 0.0])
def test_among_fixed_roles_the_adaptive_route_takes_the_least_loaded(ttft_s):
    assert adaptive(1.0, PrefillPool(), Random(1)) is None
    assert adaptive(1.0, pool(3.0, 2.0, 2.0, ttft_s=ttft_s), Random(1)) == 1


@pytest.mark.parametrize(
    "ttft_s, columns, right",
    [
        (8.0, [(1.0, 1.0, 5), (2.0, 1.0, 3)], 1),  # both are in time: it waits 1 s longer and holds up 2 s less
        (8.0, [(0.0, 1.0, 4), (1.5, 1.0, 3)], 0),  # 1.5 s longer, 1 s less
        (8.0, [(0.0, 1.0, 4), (1.0, 1.0, 3)], 0),  # equal: the first
        (8.0, [(1.0, 1.0, 5), (3.0, 1.0, 1)], 0),  # 4 s of 8 are too late
        (8.0, [(1.0, 1.0, 5), (1.1, 0.5, 1)], 0),  # decodes leave it half of its time: 4.2 s
        (3.0, [(1.0, 1.0, 5), (0.5, 1.0, 9), (0.8, 1.0, 0)], 2),  # none has it in half of the time, all do in time
        (3.0, [(1.0, 1.0, 5), (0.4, 1.0, 9), (3.0, 1.0, 0)], 1),  # in half of the time, so the others do not matter
        (1.5, [(1.0, 1.0, 5), (0.5, 1.0, 9), (0.8, 1.0, 0)], 1),  # none is in time: where it is computed first
        (2.0, [(1.0, 1.0, 9), (0.5, 0.5, 0)], 0),
        (0.0, [(1.0, 1.0, 0), (0.0, 1.0, 9)], 1),  # it is late
        (-5.0, [(1.0, 1.0, 0), (0.0, 1.0, 9)], 1),
        (inf, [(9.0, 1.0, 0), (0.0, 1.0, 8), (8.0, 1.0, 0)], 1),  # it has no limit, and no instance is too late
        (inf, [(9.0, 1.0, 0), (0.0, 1.0, 9), (8.0, 1.0, 0)], 2),
    ],
)
def test_in_time_where_it_holds_up_the_fewest_else_where_it_is_computed_first(ttft_s, columns, right):
    assert adaptive(1.0, adaptives(*columns, ttft_s=ttft_s), Random(1)) == right


COLUMN = st.tuples(st.integers(0, 9).map(float), st.sampled_from([0.02, 0.5, 1.0]), st.integers(0, 3))


@settings(deadline=None, derandomize=True)
@given(st.lists(COLUMN, min_size=1, max_size=12), st.integers(-1, 40).map(float) | st.just(inf))
def test_no_other_instance_suits_the_prompt_better(columns, ttft_s):
    def rank(place):
        queued_s, share, requests = columns[place]
        seconds = (queued_s + 1.0) / share
        late = sum(seconds >= share * ttft_s for share in IN_TIME)
        return late, seconds + requests if late < len(IN_TIME) else seconds, place

    ranks = {place: rank(place) for place in range(len(columns))}
    assert adaptive(1.0, adaptives(*columns, ttft_s=ttft_s), Random(1)) == min(ranks, key=ranks.__getitem__)
