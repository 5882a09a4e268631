"""tools/bench_hidden_hook: its arithmetic, and its errors."""

from pathlib import Path

import pytest

from tetri.bench.hidden_hook import compared

TOOLS = Path(__file__).parents[2] / "tools"


def test_the_cost_is_the_median_of_what_neighbouring_steps_differ_by():
    off = [0.040 + 0.001 * (number % 7) for number in range(201)]  # whatever the machine does falls on both
    on = [seconds + 0.0002 + 0.00001 * (number % 3) for number, seconds in enumerate(off)]
    on[5] += 1.0
    found = compared(on, off)
    assert found["step_ms"] == pytest.approx(43)
    more = found["more_ms"]
    assert more["median"] == pytest.approx(0.21) and found["percent"] == pytest.approx(0.21 / 43 * 100)
    assert more["low"] <= more["median"] <= more["high"] < 0.23
