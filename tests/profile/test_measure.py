"""An engine whose time is known, measured: the table must come back. Time is a number here, nothing is waited for."""

import math
from random import Random

import pytest

from tetri.cost import Cost
from tetri.engine.emulated import EmulatedEngine
from tetri.engine_request import Span
from tetri.instance import Capacity
from tetri.profile.fit import fit, kind_of, predicted
from tetri.profile.measure import ProfileError, What, measure
from tetri.profile.scenes import Scene, scenes

CAPACITY = Capacity(blocks=420, block_tokens=32, chunk_tokens=512, max_batch=16, context=2048)
KNOWN = Cost(
    prefill=((1.0, 0.02), (16.0, 0.021), (64.0, 0.03), (128.0, 0.055), (192.0, 0.0745), (512.0, 0.192)),
    decode=((1.0, 0.019), (4.0, 0.024), (16.0, 0.04)),
    prefill_start_s=2.5e-7,
    decode_context_s=2e-6,
)
KNEE = 192  # 2,577 tokens a second, 97 % of what 512 have; 160 have 93 %


class Stopwatch:
    """A clock that only waiting moves, by `disturb` times as much."""

    def __init__(self, disturb=lambda: 1.0):
        self.now, self.disturb = 5.0, disturb

    def clock(self):
        return self.now

    def wait(self, seconds):
        self.now += seconds * self.disturb()
        return False


def emulated(watch, cost=KNOWN, capacity=CAPACITY):
    return EmulatedEngine(
        capacity=capacity, token_bytes=8, vocabulary=300, cost=cost, wait=watch.wait, clock=watch.clock
    )


def profiled(watch, rounds, seed=1, **changes):
    engine = emulated(watch, **changes)
    points = measure(engine, scenes(engine.capacity), rounds, watch.clock, Random(seed))
    assert not engine.paged.slots, "nothing is left in the engine"
    engine.paged.check()
    return points


STEPS = [
    *([Span("a", start, start + size)] for size in (1, 7, 40, 64, 100, 192, 300, 512) for start in (0, 512, 1500)),
    *((batch, context) for batch in (1, 2, 3, 4, 9, 16) for context in (10, 2000, 12000)),
]


def slopes(cost):
    return cost.prefill_start_s, cost.decode_context_s


def seconds(cost, step):
    return cost.decode_s(*step) if isinstance(step, tuple) else cost.chunk_s(step)


def worst(found):
    return max(abs(seconds(found, step) / seconds(KNOWN, step) - 1) for step in STEPS)


def test_a_known_table_is_found_again_and_so_is_its_knee():
    made = fit(profiled(Stopwatch(), rounds=1))
    assert worst(made.cost) < 0.02
    assert slopes(made.cost) == pytest.approx(slopes(KNOWN), rel=0.02)
    assert made.cost.chunk_tokens == KNEE
    assert made.quality["held out"].worst < 0.02 and made.quality["fitted"].worst < 0.02
    assert made.quality["held out"].points > 40 and made.spread == 0.0


def test_noise_and_long_disturbances_do_not_break_it():
    """Each step takes 2 % more or less, every tenth twice as long; once in a while it stays slow for a second."""
    rng, slow = Random(11), []

    def disturb():
        if slow:
            return slow.pop()
        if rng.random() < 0.01:
            slow.extend([1.6] * 12)
        return math.exp(rng.gauss(0, 0.02)) * (2.0 if rng.random() < 0.1 else 1.0)

    made = fit(profiled(Stopwatch(disturb), rounds=7, seed=2))
    assert worst(made.cost) < 0.05
    assert slopes(made.cost) == pytest.approx(slopes(KNOWN), rel=0.1)
    assert 160 <= made.cost.chunk_tokens <= 224
    assert 0.005 < made.spread < 0.1 and made.quality["fitted"].mean < 0.05


def test_points_say_what_ran():
    watch = Stopwatch()
    engine = emulated(watch)
    told = []
    wanted = [Scene((600,)), Scene((8, 12)), Scene((), (10, 40)), Scene((520,), (10,), held_out=True)]
    points = measure(engine, wanted, 3, watch.clock, Random(1), lambda done, total: told.append((done, total)))
    assert told == [(number, 12) for number in range(1, 13)]
    found = {point.what: point for point in points}
    assert What(((0, 512),)) in found and What(((512, 600),)) in found and What(((0, 8), (0, 12))) in found
    decodes = [what for what in found if what.batch == 2]
    assert [what.context for what in decodes] == [54, 56, 58, 60, 62, 64], "10 + 40, the first step is not counted"
    mixed = [what for what in found if kind_of(found[what]) == "mixed"]
    assert mixed == [What(((0, 511),), 1, 12), What(((511, 520),), 1, 13)], "the decode takes one of 512"
    for what, point in found.items():
        assert point.times == 3 and point.held_out == (what in mixed)
        assert point.seconds == pytest.approx(predicted(KNOWN, point)) and point.spread == pytest.approx(0)


def test_what_a_fitted_scene_shows_as_well_is_not_held_out():
    watch = Stopwatch()
    wanted = [Scene((512,)), Scene((600,), (), held_out=True)]
    points = measure(emulated(watch), wanted, 1, watch.clock, Random(1))
    assert {point.what.chunk: point.held_out for point in points} == {((0, 512),): False, ((512, 600),): True}


def test_the_lower_quartile_of_the_rounds_counts():
    factors = iter([7.0, 1.0, 9.0, 2.0, 1.5, 8.0])
    watch = Stopwatch(lambda: next(factors))
    engine = emulated(watch, capacity=Capacity(8, 32, 64, 4, 200))
    (point,) = measure(engine, [Scene((10,))], 5, watch.clock, Random(1))  # the first is to warm up
    assert point.seconds == pytest.approx(1.5 * KNOWN.chunk_s([Span("a", 0, 10)]))
    assert point.spread == pytest.approx(0.5) and point.times == 5


@pytest.mark.parametrize(
    "capacity", [Capacity(2, 1, 2, 1, 2), Capacity(2, 16, 65, 64, 20), Capacity(50, 16, 2048, 4, 100)]
)
def test_a_tiny_engine_is_measured_as_far_as_it_goes(capacity):
    watch = Stopwatch()
    engine = emulated(watch, capacity=capacity)
    points = measure(engine, scenes(capacity), 1, watch.clock, Random(1))
    assert all(point.seconds == pytest.approx(predicted(KNOWN, point)) for point in points)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda done: {"allocated": ()}, "gave blocks to 0 of 3 requests"),
        (  # of three decodes that ran it reports two
            lambda done: {"tokens": done.tokens[len(done.tokens) == 3 :]},
            r"should have decoded 3 requests ran decode-\d, decode-\d$",
        ),
    ],
)
def test_an_engine_that_does_not_do_as_told_is_an_error(monkeypatch, wrong, says):
    engine = emulated(Stopwatch())
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda most=1: (done := step(most)).changed(**wrong(done)))
    with pytest.raises(ProfileError, match=says):
        measure(engine, [Scene((), (10, 10, 10))], 1, engine.clock, Random(1))
    assert not engine.paged.slots, "nothing is left in the engine"


def test_it_ends_before_the_scene_for_which_there_is_no_time():
    watch = Stopwatch()
    wanted = [Scene((size,)) for size in (10, 20, 30)]
    asked = []

    def enough(complete):
        asked.append(complete)
        return len(asked) == 6

    points = measure(emulated(watch), wanted, 4, watch.clock, Random(1), enough=enough)
    assert sorted(point.times for point in points) == [1, 2, 2] and asked == [False] * 3 + [True] * 3
    with pytest.raises(ProfileError, match="enough for 2 of 3 scenes only"):
        left = iter([False, False, True])
        measure(emulated(watch), wanted, 4, watch.clock, Random(1), enough=lambda complete: next(left))
