"""Which prefill instance a request goes to."""

from collections import Counter
from random import Random

from tetri.policy.route import drawn, least_loaded, random, round_robin
from tetri.policy.views import PrefillPool


def pool(*queued_s, last=-1):
    return PrefillPool([f"p{number}" for number in range(len(queued_s))], list(queued_s), last)


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
