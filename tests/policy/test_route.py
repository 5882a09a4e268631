"""Which prefill instance a request goes to."""

from collections import Counter
from math import inf, nextafter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tetri.policy.route import IN_TIME, adaptive, drawn, least_loaded, random, round_robin
from tetri.policy.views import PrefillPool


def pool(*queued_s, last=-1):
    return PrefillPool([f"p{number}" for number in range(len(queued_s))], list(queued_s), last=last)


def adaptives(*columns, ttft_s):
    """Columns of (queued_s, share, requests)."""
    queued_s, share, requests = (list(column) for column in zip(*columns, strict=True))
    groups = {}
    for place, count in enumerate(requests):
        groups.setdefault(count, {})[place] = None
    return PrefillPool([f"a{place}" for place in range(len(columns))], queued_s, share, requests, groups, ttft_s)


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


def test_among_fixed_roles_the_adaptive_route_takes_the_least_loaded():
    assert adaptive(1.0, PrefillPool(), Random(1)) is None
    busy = pool(3.0, 2.0, 2.0)
    busy.ttft_s = 100.0
    assert adaptive(1.0, busy, Random(1)) == 1


@pytest.mark.parametrize(
    "ttft_s, columns, right",
    [
        (8.0, [(1.0, 1.0, 5), (2.0, 1.0, 3)], 1),  # both are in time: where fewer requests are delayed
        (8.0, [(1.0, 1.0, 5), (3.0, 1.0, 3)], 0),  # 4 s of 8 are too late
        (8.0, [(1.0, 1.0, 5), (1.1, 0.5, 3)], 0),  # decodes leave it half of its time: 4.2 s
        (8.0, [(1.0, 0.9, 3), (0.5, 0.9, 3), (0.0, 1.0, 4)], 1),  # as many requests: where it is computed first
        (8.0, [(0.5, 0.9, 3), (0.5, 0.9, 3)], 0),
        (3.0, [(1.0, 1.0, 5), (0.5, 1.0, 9), (0.8, 1.0, 0)], 2),  # none has it in half of the time, all do in time
        (3.0, [(1.0, 1.0, 5), (0.4, 1.0, 9), (3.0, 1.0, 0)], 1),  # in half of the time, so the others do not matter
        (1.5, [(1.0, 1.0, 5), (0.5, 1.0, 9), (0.8, 1.0, 0)], 1),  # none is in time: where it is computed first
        (2.0, [(1.0, 1.0, 9), (0.5, 0.5, 0)], 0),
        (0.0, [(1.0, 1.0, 0), (0.0, 1.0, 9)], 1),  # it is late
        (inf, [(1.0, 1.0, 0), (0.0, 1.0, 9)], 1),  # it has no limit
        (inf, [(1.0, 1.0, 3), (1.0, 1.0, 2), (1.0, 0.5, 1)], 1),  # on a tie the one with fewer requests
        (-5.0, [(1.0, 1.0, 0), (0.0, 1.0, 9)], 1),
        (8.0, [(9.0, 1.0, 0), (9.0, 1.0, 2), (0.0, 1.0, 7), (0.0, 1.0, 9)], 2),  # of the next group that is in time
    ],
)
def test_in_time_where_it_delays_the_fewest_requests_else_where_it_is_computed_first(ttft_s, columns, right):
    assert adaptive(1.0, adaptives(*columns, ttft_s=ttft_s), Random(1)) == right


COLUMN = st.tuples(st.integers(0, 9).map(float), st.sampled_from([0.02, 0.5, 1.0]), st.integers(0, 3))


@settings(deadline=None, derandomize=True)
@given(st.lists(COLUMN, min_size=1, max_size=12), st.integers(-1, 40).map(float) | st.just(inf))
def test_no_other_instance_suits_the_prompt_better(columns, ttft_s):
    def seconds(place):
        return (columns[place][0] + 1.0) / columns[place][1]

    def rank(place):
        limits = [share * ttft_s for share in IN_TIME] if ttft_s < inf else [inf, nextafter(soonest, inf)]
        late = sum(seconds(place) >= limit for limit in limits)
        return late, columns[place][2] if late < len(IN_TIME) else 0, seconds(place), place

    soonest = min(map(seconds, range(len(columns))))

    ranks = {place: rank(place) for place in range(len(columns))}
    assert adaptive(1.0, adaptives(*columns, ttft_s=ttft_s), Random(1)) == min(ranks, key=ranks.__getitem__)
