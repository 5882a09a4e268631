"""How far odds may be trusted."""

from math import ceil, sqrt
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tetri.core.length.calibration import START, WINDOW, Calibration
from tetri.policy.distribution import Curve

GRID = [step / 20 for step in range(21)]


def fed(places, levels=()):
    calibration = Calibration(levels)
    for place in places:
        calibration.came(place)
    return calibration


def test_without_levels_odds_are_taken_at_their_word():
    calibration = Calibration(())
    for share in GRID:
        assert calibration.trusted(share) == pytest.approx(share, abs=0.02)
        assert calibration.level(share) == pytest.approx(share, abs=0.03)


def test_the_levels_of_training_hold_before_any_traffic():
    """A predictor that says too little: half of the lengths came above 0.8 of their odds."""
    calibration = Calibration((0.4, 0.8, 0.95))
    assert calibration.trusted(0.8) == pytest.approx(0.5, abs=0.02)
    assert calibration.trusted(0.4) == pytest.approx(0.25, abs=0.02)
    assert calibration.level(0.75) == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("share", [0.5, 0.8, 0.9, 0.95])
def test_the_next_length_is_below_the_level_as_often_as_asked(share):
    """However wrong the odds are: here places crowd at both ends, as of a predictor that is too sure."""
    rng, inside, draws = Random(2), 0, 20_000
    calibration = fed(rng.betavariate(0.2, 0.3) for _ in range(WINDOW + START))
    for _ in range(draws):
        place = rng.betavariate(0.2, 0.3)
        inside += place <= calibration.level(share)
        calibration.came(place)
    assert inside / draws == pytest.approx(share, abs=3 * sqrt(share * (1 - share) / draws))


def test_a_level_that_the_window_cannot_vouch_for_is_the_end_of_the_odds():
    calibration = fed([0.5] * WINDOW)
    assert calibration.level(0.99) == 0.5 and calibration.level(0.999) == 1.0
    assert ceil((WINDOW + 1) * 0.999) > WINDOW


def test_those_that_were_cut_off_count_as_others_beyond_them():
    """Odds that are right, and half of the texts cut off at the place 0.5: nothing changes."""
    calibration, rng = Calibration(()), Random(3)
    for _ in range(4 * WINDOW):
        place = rng.random()
        if rng.random() < 0.5 and place > 0.5:
            calibration.passed(0.5)
        else:
            calibration.came(place)
    for share in GRID:
        assert calibration.trusted(share) == pytest.approx(share, abs=0.07)


def test_those_that_were_cut_off_are_never_taken_to_have_ended_before():
    calibration = Calibration(())
    for _ in range(2 * WINDOW):
        calibration.passed(0.9)
    assert calibration.trusted(0.89) < 0.01


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.lists(st.floats(0, 1), max_size=600), st.lists(st.floats(0, 1), max_size=5).map(sorted))
def test_corrected_odds_are_odds(places, levels):
    calibration = fed(places, levels)
    curve = calibration.corrected(Curve(tuple(range(21)), tuple(GRID)))
    assert (curve.below[0], curve.below[-1]) == (0.0, 1.0) and list(curve.below) == sorted(curve.below)
    assert [calibration.level(share) for share in GRID] == sorted(calibration.level(share) for share in GRID)
    assert [calibration.trusted(place) for place in GRID] == sorted(calibration.trusted(place) for place in GRID)
