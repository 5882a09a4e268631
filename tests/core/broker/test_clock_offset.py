"""How far a worker's clock is behind the broker's."""

import pytest

from tetri.core.broker.clock_offset import DRIFT, ClockOffset


def test_the_fastest_message_tells():
    clock = ClockOffset()
    found = [clock.seen(at, now) for at, now in [(10.0, 110.5), (11.0, 111.1), (12.0, 112.7)]]
    assert found == pytest.approx([100.5, 100.1, 100.1], abs=3 * DRIFT)
    assert found[1] < found[2] <= found[1] + 2 * DRIFT  # creeps up, for the time that has passed


def test_a_clock_that_runs_slow_or_fast_is_followed():
    for rate in (1 - DRIFT / 2, 1 + DRIFT / 2):
        clock = ClockOffset()
        for second in range(100_000):
            now = 50.0 + second
            offset = clock.seen(second * rate, now + 0.001)
        assert second * rate + offset == pytest.approx(now + 0.001, abs=0.001)
