"""How far a worker's clock is behind the broker's."""

import pytest

from tetri.core.broker.clock_offset import WINDOW_S, ClockOffset


def test_the_fastest_message_tells():
    clock = ClockOffset()
    assert [clock.seen(at, now) for at, now in [(10.0, 110.5), (11.0, 111.25), (12.0, 112.75)]] == [
        100.5,
        100.25,
        100.25,
    ]


def test_it_is_remembered_for_a_while_and_then_forgotten():
    clock = ClockOffset()
    clock.seen(0.0, 100.0)
    found = [clock.seen(second, 100.5 + second) for second in range(1, 30)]
    assert found[: int(WINDOW_S)] == [100.0] * int(WINDOW_S) and found[-1] == 100.5


@pytest.mark.parametrize("rate", [1 - 1e-4, 1 + 1e-4])
def test_a_clock_that_runs_slow_or_fast_is_followed(rate):
    clock = ClockOffset()
    for number in range(1000):
        now = 50.0 + number
        offset = clock.seen(number * rate, now + 0.001)
    assert number * rate + offset == pytest.approx(now, abs=0.004)


def test_a_clock_that_stopped_for_long_is_known_at_once():
    """Its first message after that may have waited, and the next one tells."""
    clock = ClockOffset()
    found = [clock.seen(at, 100.0 + at) for at in (0.0, 0.5, 1.0)]
    found += [clock.seen(at, 100.0 + at + 2 * WINDOW_S) for at in (1.5, 2.0)]
    assert found == [100.0] * 3 + [100.0 + 2 * WINDOW_S] * 2
