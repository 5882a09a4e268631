"""tools/bench_predictor: its arithmetic, and its errors."""

from pathlib import Path

import pytest

from tetri.bench import predictor_cost

TOOLS = Path(__file__).parents[2] / "tools"


def test_a_way_is_compared_by_medians_and_in_pairs():
    without = [0.100 + 0.010 * (number % 5) for number in range(20)]  # whatever the machine does falls on both
    fetched = [seconds + 0.006 for seconds in without]
    found = predictor_cost.compared(fetched, without, 15)
    assert found["percent"] == pytest.approx(5) and found["paired"]["median"] == pytest.approx(5)
    assert (found["paired"]["low"], found["paired"]["high"]) == (pytest.approx(5), pytest.approx(5))
    assert found["ms"] == pytest.approx(126) and found["in_time"] == 0.75


@pytest.mark.parametrize(("tokens", "limit"), [(64, None), (255, None), (256, 10), (1023, 10), (1024, 3), (4000, 3)])
def test_the_limit_is_that_of_the_length(tokens, limit):
    assert predictor_cost.limit_percent(tokens) == limit


def test_all_of_it_is_in_the_table():
    each = predictor_cost.compared([0.11, 0.11], [0.1, 0.1], 1)
    found = {
        "batch": {"prompts": 16, "tokens": 100, "ms": {"median": 36.4, "worst": 40.0}, "limit_ms": 250.0},
        "prefill": {
            "64": {"without_ms": 50.0, "ways": {}, "limit_percent": None},
            "256": {"without_ms": 100.0, "ways": {"parallel": each}, "limit_percent": 10.0},
        },
    }
    lines = predictor_cost.shown(found).splitlines()
    assert lines[0] == "a batch of 16 prompts of 100 tokens: median 36 ms, worst 40 ms (limit 250 ms)"
    assert lines[1:3] == [
        "prefill of 64 tokens: 50.0 ms without a predictor (limit none)",
        "prefill of 256 tokens: 100.0 ms without a predictor (limit 10 %)",
    ]
    assert lines[3].split() == ["ms", "medians", "%", "in", "pairs", "%", "low", "high", "in", "time", "%"]
    assert lines[4].split() == ["parallel", "110.0", "+10.0", "+10.0", "+10.0", "+10.0", "50"] and len(lines) == 5
