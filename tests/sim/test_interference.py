"""The cost table of the paper's testbed beside its interference measurements: none is more than a quarter off."""

import pytest

from tetri import cost
from tetri.sim.interference import points, prompts


@pytest.fixture(scope="module")
def table():
    return cost.load("v100-opt13b")


def test_every_point_is_near_the_papers(table):
    found = list(points(table))
    assert len(found) == 17 + 24 + 35
    off = [abs(point.value / point.paper - 1) for point in found]
    assert max(off) < 0.25 and sum(share > 0.15 for share in off) <= 4
    assert sum(off) / len(off) < 0.08


def test_the_prefill_rate_has_its_knee_at_the_chunk_size(table):
    rates = {tokens: tokens / table.chunk_s(prompts(tokens)) for tokens in (64, 128, 256, 512, 1024, 2048)}
    best = max(rates.values())
    assert min(tokens for tokens, rate in rates.items() if rate >= 0.95 * best) == table.chunk_tokens == 512
    assert rates[256] < 0.8 * best
