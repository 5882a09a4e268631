"""From points to a table, without an engine."""

import pytest

from tetri.cost import Cost
from tetri.engine_request import Span
from tetri.profile.fit import curve_and_slope, fit, isotonic, kind_of, knee, quality
from tetri.profile.measure import MeasuredPoint, ProfileError, What

TRUE = Cost(((1.0, 0.02), (100.0, 0.12), (200.0, 0.3)), ((1.0, 0.01), (8.0, 0.02)), 1e-6, 2e-6)


def point(what, cost=TRUE, factor=1.0, held_out=False):
    return MeasuredPoint(what, cost.step_s(what.spans, what.batch, what.context) * factor, 0.0, 3, held_out)


def chunk(size, start=0):
    return What(((start, start + size),))


CHUNKS = [chunk(1), chunk(100), chunk(200), chunk(200, 200), chunk(200, 400), chunk(100, 200)]
BATCHES = [What((), batch, batch * length) for batch in (1, 8) for length in (10, 100, 1000)]


def test_what_was_put_in_comes_out():
    made = fit([point(what) for what in (*CHUNKS, *BATCHES)])
    assert (made.cost.prefill_start_s, made.cost.decode_context_s) == pytest.approx((1e-6, 2e-6), rel=1e-3)
    for found, right in zip(made.cost.prefill + made.cost.decode, TRUE.prefill + TRUE.decode, strict=True):
        assert found == pytest.approx(right, rel=1e-3)
    assert made.cost.chunk_tokens == 100 and made.notes == ()
    fitted = made.quality["fitted"]
    assert fitted.points == 12 and fitted.worst < 1e-3 and fitted.r2 > 0.9999


def test_held_out_points_are_told_apart_and_change_nothing():
    seen = [point(what) for what in (*CHUNKS, *BATCHES)]
    held = [
        point(chunk(150), factor=1.1, held_out=True),
        point(What((), 4, 400), factor=0.9, held_out=True),
        point(What(((0, 50), (0, 50))), held_out=True),
        point(What(((0, 50),), 2, 100), factor=0.8, held_out=True),
    ]
    made = fit([*seen, *held])
    assert made.cost == fit(seen).cost
    prefill, decode = 0.1 / 1.1, 0.1 / 0.9
    worst = {"fitted": 0, "held out": 0.25, "prefill": 0, "prefill, held out": prefill, "decode": 0}
    worst |= {"decode, held out": decode, "packed, held out": 0, "mixed, held out": 0.25}
    assert {name: quality.worst for name, quality in made.quality.items()} == pytest.approx(worst, abs=1e-3)
    assert made.quality["held out"].mean == pytest.approx((prefill + decode + 0.25) / 4, abs=1e-3)
    assert (made.quality["held out"].points, made.quality["fitted"].points) == (4, 12)


def test_a_chunk_that_was_only_seen_deep_in_a_prompt_makes_no_point_of_the_curve():
    made = fit([point(what) for what in (*CHUNKS, chunk(50, 200), *BATCHES)])
    assert [x for x, _ in made.cost.prefill] == [1, 100, 200]


def test_what_could_not_be_told_is_said():
    short = [point(chunk(size)) for size in (1, 100)]
    made = fit([*short, *(point(What((), batch, 10 * batch)) for batch in (1, 8))])
    assert (made.cost.prefill_start_s, made.cost.decode_context_s) == (0.0, 0.0)
    first, second, third = made.notes
    assert "prefill_start_s is unknown" in first and "decode_context_s is unknown" in second
    assert "a larger engine.chunk_tokens may show the knee" in third


def test_points_that_make_no_table():
    with pytest.raises(ProfileError, match="take no time"):
        fit([point(what, Cost()) for what in (*CHUNKS, *BATCHES)])
    with pytest.raises(ProfileError, match="holds neither"):
        fit([point(what) for what in CHUNKS])


def test_times_that_leave_nothing_for_a_chunk_are_an_error():
    """Chunks that start deep took so much longer than that of their size at a start that the slope eats up a size."""
    seconds = {64: (0.302, 0.124, 0.676, 0.765), 256: (0.158, 2.218, 3.594, 6.317), 512: (1.783, 5.821, 18.306, 9.756)}
    starts = (0, 500, 1000, 1500)
    points = [
        MeasuredPoint(chunk(size, start), took, 0.0, 3, False)
        for size, times in seconds.items()
        for start, took in zip(starts, times, strict=True)
    ]
    with pytest.raises(ProfileError, match=r"a chunk of 64 tokens would take no time .* measure again"):
        fit([*points, *(point(what) for what in BATCHES)])


def test_the_knee_is_the_smallest_chunk_near_the_best_rate():
    assert knee(((1, 1.0), (10, 5.3), (11, 5.75), (20, 10.0), (40, 21.0))) == 11
    assert knee(((1, 1.0), (10, 5.2), (20, 10.0), (40, 21.0))) == 10
    assert knee(((5, 1.0),)) == 5


def test_kinds():
    whats = [chunk(1), What(((0, 1), (0, 1))), What((), 1, 5), What(((0, 1),), 1, 5)]
    assert [kind_of(point(what)) for what in whats] == ["prefill", "packed", "decode", "mixed"]
    assert whats[1].spans == [Span("0", 0, 1), Span("1", 0, 1)]
    assert (What(((5, 8), (2, 4))).tokens, What(((5, 8), (2, 4))).pairs) == (5, 19)


def test_errors_are_shares_of_what_was_measured():
    found = quality(TRUE, [point(chunk(100), factor=2.0), point(chunk(200), factor=0.4)])
    assert found.points == 2 and found.mean == pytest.approx((0.5 + 1.5) / 2) and found.worst == pytest.approx(1.5)
    assert found.r2 == pytest.approx(1 - (0.12**2 + 0.18**2) / (2 * 0.06**2))


@pytest.mark.parametrize(
    ("levels", "weights", "wanted"),
    [
        ([], [], []),
        ([1, 2, 3], [1, 1, 1], [1, 2, 3]),
        ([1, 3, 2], [1, 1, 1], [1, 2.5, 2.5]),
        ([4, 2, 1], [1, 1, 2], [2, 2, 2]),
        ([3, 3, 6, 2, 1, 9, 8], [1, 1, 1, 1, 3, 2, 2], [17 / 7] * 5 + [8.5] * 2),
    ],
)
def test_a_sequence_that_falls_is_pooled(levels, weights, wanted):
    assert isotonic(levels, weights) == pytest.approx(wanted)


def test_a_slope_is_never_negative():
    falling = [(1.0, 0.0, 2.0), (1.0, 100.0, 1.0)]
    assert curve_and_slope(falling) == (((1.0, 1.5),), 0.0)
