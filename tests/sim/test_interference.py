"""The cost table of the paper's testbed beside its interference measurements: none is more than a quarter off."""

import pytest

from tetri import cost
from tetri.sim.interference import decode_rate, points, prompts


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


def test_one_heavy_prefill_makes_a_decode_step_five_times_longer(table):
    alone, beside = table.step_s([], 1, 48), table.step_s(prompts(512), 1, 48)
    assert 4.5 < beside / alone < 6


def test_light_prefills_beside_a_light_one_double_it_by_seven_and_eightfold_it_by_sixty_three(table):
    alone = table.chunk_s(prompts(18))
    assert 1.5 < table.chunk_s(prompts(*[18] * 8)) / alone < 2.5
    assert 7 < table.chunk_s(prompts(*[18] * 64)) / alone < 10


def test_heavy_decodes_take_a_sixth_of_the_throughput_at_batch_128(table):
    light, half = decode_rate(table, 128, 0.0), decode_rate(table, 128, 0.5)
    assert -0.20 < half / light - 1 < -0.10
