"""Which decode instance a request goes to."""

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tetri.policy.dispatch import (
    DRAWS,
    adaptive,
    first_fit,
    imbalance,
    least_deferred,
    least_loaded,
    power_of_two,
    power_of_two_ratio,
    random,
    round_robin,
)
from tetri.policy.rules import DECODE_ROUTES
from tetri.policy.views import EXCLUDED, DecodePool, Need

LIGHT, HEAVY = Need(4, 10, heavy=False), Need(4, 10, heavy=True)


def pool(*columns, last=-1):
    """Columns of (free, spare, heavy, light)."""
    free, spare, heavy, light = (list(column) for column in zip(*columns, strict=True))
    iids = [f"d{number}" for number in range(len(free))]
    return DecodePool(iids, free, spare, heavy, light, most=[10] * len(free), last=last)


def chosen(route, need, among, draws=200):
    """How often each column is chosen."""
    rng = Random(11)
    return Counter(route(need, among, rng) for _ in range(draws))


class Counted(list):
    """Counts the passes over all elements, and the looks at one."""

    passes = looks = 0

    def __iter__(self):
        Counted.passes += 1
        return super().__iter__()

    def __getitem__(self, index):
        Counted.looks += 1
        return super().__getitem__(index)


@pytest.mark.parametrize("need", [LIGHT, HEAVY])
def test_of_two_the_one_with_fewer_heavy_decodes_and_of_equals_the_one_with_more_spare(need):
    assert set(chosen(power_of_two, need, pool((20, 20, 3, 0), (20, 12, 2, 90)))) == {1}
    assert set(chosen(power_of_two, need, pool((20, 12, 2, 1), (20, 13, 2, 90)))) == {1}


@pytest.mark.parametrize(
    "need, columns, right",
    [
        (HEAVY, [(20, 20, 1, 3), (20, 20, 1, 9)], 1),  # 2:3 and 2:9
        (HEAVY, [(20, 20, 0, 0), (20, 20, 5, 1)], 1),  # 1:0 and 6:1
        (LIGHT, [(20, 20, 0, 0), (20, 20, 5, 900)], 0),  # 0:1 and 5:901
        (LIGHT, [(20, 20, 2, 1), (20, 21, 4, 3)], 1),  # 2:2 and 4:4
        (HEAVY, [(20, 20, 3, 0), (20, 21, 1, 0)], 1),  # 4:0 and 2:0
    ],
)
def test_the_lower_ratio_once_the_request_is_there(need, columns, right):
    assert set(chosen(power_of_two_ratio, need, pool(*columns))) == {right}


@pytest.mark.parametrize("route", [power_of_two, power_of_two_ratio])
def test_alpha_has_room_to_the_end_and_goes_before_beta(route):
    one_alpha = pool((9, 9, 0, 0), (10, 10, 9, 0), (50, 9, 0, 0))
    assert set(chosen(route, LIGHT, one_alpha)) == {1}
    promised = pool((9, 3, 0, 0), (5, 4, 9, 0), (3, 3, 0, 0), (4, 4, 0, 0), (9, -7, 0, 0))
    assert set(chosen(route, LIGHT, promised)) == {1}  # of those with room now the one with most spare, the first
    assert set(chosen(route, LIGHT, pool((9, -7, 0, 0), (8, -9, 0, 0)))) == {0}
    left_out = pool((-1, 99, 0, 0), (9, 1, 9, 9))
    assert set(chosen(route, LIGHT, left_out)) == {1}


@pytest.mark.parametrize("route", [power_of_two, power_of_two_ratio])
@pytest.mark.parametrize("others", [0, 100])
def test_every_pair_of_alpha_is_as_likely(route, others):
    """Among many others they are found by the pass, alone by drawing; the fewest heavy ones win their pairs."""
    alpha = [(99, 99, number, 1) for number in range(4)]
    counts = chosen(route, LIGHT, pool(*alpha, *[(1, 1, 0, 0)] * others), draws=6000)
    assert sorted(counts) == [0, 1, 2]  # the last of four loses both pairs that it is in
    for column, pairs in enumerate((3, 2, 1)):
        assert counts[column] == pytest.approx(pairs * 1000, rel=0.1)


@pytest.mark.parametrize("share, most", [(1.0, 0), (0.5, 50), (0.01, 1000), (0.0, 1000)])
def test_drawing_and_testing_looks_at_few_columns_while_many_have_room(share, most):
    """Of 500 requests hardly any passes over all columns, then; else each does twice."""
    rooms = [99 if number < share * 1000 else 1 for number in range(1000)]
    among = DecodePool([""] * 1000, *map(Counted, (rooms, rooms, [0] * 1000, [0] * 1000)))
    Counted.passes = Counted.looks = 0
    assert None not in chosen(power_of_two, Need(1, 10, heavy=False), among, draws=500)
    assert Counted.passes <= most and Counted.looks <= 500 * 5 * DRAWS


def at_home(home, step_s, *columns):
    among = pool(*columns)
    among.home, among.step_s = home, list(step_s)
    return among


@pytest.mark.parametrize(
    "columns, right",
    [
        ([(4, -9, 9, 9), (99, 99, 0, 0), (99, 99, 0, 0)], {0}),  # memory for the prompt is enough to stay
        ([(3, 3, 0, 0), (99, 99, 0, 0), (99, 99, 0, 0)], {2}),  # of two the one with the shorter step
        ([(3, 3, 0, 0), (99, 99, 0, 0), (9, 9, 0, 0)], {1}),  # only this one has memory up to the end
        ([(3, 3, 0, 0), (9, 5, 0, 0), (9, 6, 0, 0)], {2}),  # none has: the one with the most spare memory
        ([(3, 3, 0, 0), (3, 3, 0, 0), (3, 3, 0, 0)], {None}),
        ([(EXCLUDED, 99, 0, 0), (9, 9, 0, 0), (3, 3, 0, 0)], {1}),  # it must not stay
    ],
)
def test_an_adaptive_instance_keeps_its_prompts_while_it_has_memory(columns, right):
    assert set(chosen(adaptive, LIGHT, at_home(0, (9.0, 2.0, 1.0), *columns))) == right


def test_without_a_home_the_adaptive_route_is_the_paper_s():
    among = at_home(-1, (1.0, 2.0, 9.0), *[(20, 20, heavy, 0) for heavy in (7, 5, 3)])
    assert chosen(adaptive, LIGHT, among) == chosen(power_of_two, LIGHT, among)


def test_among_many_it_does_not_choose_the_same_one_as_every_other_dispatcher():
    among = at_home(0, [0.0, *range(1, 10)], (0, 0, 0, 0), *[(20, 20, 0, 0)] * 9)
    counts = chosen(adaptive, LIGHT, among, draws=2000)
    assert sorted(counts) == [*range(1, 9)] and counts[1] < 1000  # the one with the longest step loses all its pairs


def test_first_fit_round_robin_and_least_loaded_skip_who_has_no_room():
    among = pool((3, 0, 0, 0), (5, 0, 0, 0), (9, 9, 0, 0))
    first = [first_fit(Need(blocks, 99, False), among, Random(1)) for blocks in (3, 4, 9, 10)]
    assert first == [0, 1, 2, None]
    rooms = [(9, 9, 0, 0), (3, 3, 0, 0), (9, 9, 0, 0)]
    assert [round_robin(LIGHT, pool(*rooms, last=last), Random(1)) for last in (-1, 0, 1, 2)] == [0, 2, 2, 0]
    assert least_loaded(HEAVY, pool((9, 9, 3, 1), (9, 9, 1, 2), (3, 3, 0, 0)), Random(1)) == 1
    assert least_loaded(HEAVY, pool((8, 9, 3, 1), (9, 9, 1, 3)), Random(1)) == 1


@pytest.mark.parametrize("others", [0, 500])
def test_random_takes_each_with_room_as_often(others):
    counts = chosen(random, LIGHT, pool((4, 0, 9, 9), (3, 3, 0, 0), (9, 9, 0, 0), *[(0, 0, 0, 0)] * others), draws=2000)
    assert sorted(counts) == [0, 2] and min(counts.values()) > 900


def test_the_worst_case_piles_heavy_decodes_up_and_keeps_light_ones_away():
    among = pool((9, 9, 90, 0), (9, 9, 0, 0), (3, 3, 0, 0), (9, 9, 0, 0))
    assert set(chosen(imbalance, HEAVY, among)) == {0}
    assert set(chosen(imbalance, LIGHT, among)) == {1, 3}
    assert set(chosen(imbalance, LIGHT, pool((9, 9, 0, 0)))) == {0}
    assert set(chosen(imbalance, HEAVY, pool((3, 3, 0, 0), (9, 9, 0, 0)))) == {1}


@pytest.mark.parametrize(
    "columns, right",
    [
        ([(0, 1, 0, 0), (0, 3, 0, 0), (0, 2, 0, 0)], {1, 2}),  # the better of two: never the worst, nor always the best
        ([(0, 1, 0, 0), (-9, 2, 0, 0)], {1}),
        ([(-9, -50, 0, 0), (-10, -10, 0, 0)], {0}),  # the other one lacks as many blocks as it has
        ([(-10, -10, 0, 0), (EXCLUDED, 99, 0, 0)], {None}),
        ([], {None}),
    ],
)
def test_without_memory_anywhere_the_better_of_two_that_may_defer_more(columns, right):
    among = pool(*columns) if columns else DecodePool()
    assert {least_deferred(among, Random(seed)) for seed in range(50)} == right


AMOUNT = st.integers(-3, 12)
COUNT = st.integers(0, 5)
ANY_COLUMN = st.tuples(AMOUNT, AMOUNT, COUNT, COUNT).map(lambda column: (column[0], min(column[:2]), *column[2:]))
ANY_NEED = st.builds(lambda blocks, more, heavy: Need(blocks, blocks + more, heavy), COUNT, COUNT, st.booleans())


@settings(deadline=None, derandomize=True)
@given(st.lists(ANY_COLUMN, max_size=20), ANY_NEED, st.integers(0, 99), st.sampled_from(sorted(DECODE_ROUTES)))
def test_whoever_is_chosen_has_room_and_nobody_only_when_nobody_has(columns, need, seed, name):
    among = pool(*columns) if columns else DecodePool()
    column = DECODE_ROUTES[name](need, among, Random(seed))
    if column is None:
        assert all(free < need.blocks for free in among.free)
    else:
        assert among.free[column] >= need.blocks
        assert column == DECODE_ROUTES[name](need, among, Random(seed))  # nothing is remembered
        alpha = [number for number, spare in enumerate(among.spare) if spare >= need.end_blocks]
        assert column in alpha or not alpha or not name.startswith("power")
