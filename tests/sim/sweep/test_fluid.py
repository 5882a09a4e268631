import pytest

from tetri.cost import Cost
from tetri.sim.sweep.arrangements import named
from tetri.sim.sweep.cases import Case
from tetri.sim.sweep.evaluate import evaluate
from tetri.sim.sweep.fluid import bound

#: 1 ms a prompt token in chunks, 10 ms a decode step and 1 ms for each request more
COST = Cost(prefill=((1, 0.001), (4096, 4.096)), decode=((1, 0.010), (256, 0.265)), kv_tokens=1 << 20)


def test_prompts_alone_are_computed_at_the_best_rate():
    assert bound(COST, [(100, 1)], 1.0, 3) == pytest.approx(3 / 0.1)


def test_decodes_alone_fill_the_batch_that_keeps_the_limit():
    cost = Cost(prefill=((1, 0.0), (4096, 1e-9)), decode=((1, 0.010), (256, 0.265)), kv_tokens=1 << 20)
    # 41 requests take 50 ms a step; of ten tokens nine must be timely, and one costs 1 ms at least
    expected = 1 / (0.9 * 50 * 0.050 / 41 + 0.1 * 50 * 0.001)
    assert bound(cost, [(1, 51)], 0.050, 1) == pytest.approx(expected, rel=0.01)


def test_both_phases_take_their_time():
    # A chunk beside decodes saves the 10 ms of a step alone, so that the bound is above that of two separate phases.
    lengths, limit_s = [(100, 51)], 0.050
    apart = 1 / (0.1 + 0.9 * 50 * 0.050 / 41 + 0.1 * 50 * 0.001)
    assert apart < bound(COST, lengths, limit_s, 1) < 1 / (0.1 + 0.9 * 50 * 0.001)


def test_a_stricter_limit_is_no_better_and_one_below_a_step_is_none():
    bounds = [bound(COST, [(100, 51), (300, 20)], limit_s, 4) for limit_s in (0.005, 0.02, 0.05, 0.2)]
    assert bounds[0] == 0 and bounds == sorted(bounds)


def test_the_memory_limits_the_batch():
    small = Cost(prefill=COST.prefill, decode=COST.decode, kv_tokens=500)
    assert bound(small, [(100, 51)], 1.0, 1) < 0.9 * bound(COST, [(100, 51)], 1.0, 1)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (Case("LPHD", "cpu-smollm2", 2, "balanced", size=2000), "coupled-ll-512"),
        (Case("HPHD", "v100-opt13b", 2, "tight-tpot", size=2000), "coupled-ll-256"),
        (Case("HPLD", "cpu-smollm2", 4, "balanced", size=2000), "tandem-3+1-512"),
        (Case("Mixed", "v100-opt13b", 4, "tight-ttft", size=2000), "tandem-1+3-512"),
    ],
    ids=lambda each: each if isinstance(each, str) else each.name,
)
def test_no_arrangement_reaches_the_goal_above_the_bound(case, name):
    split = named(name.replace("tandem", "split"), case.instances)
    arrangement = split.estimate if name.startswith("tandem") else split
    assert evaluate(case, arrangement, 1.02 * case.bound).attained[case.regime].share < 0.9


def test_the_bound_of_a_split_is_that_of_its_slower_phase_and_below_that_of_all():
    case = Case("HPLD", "cpu-smollm2", 4, "balanced")
    bounds = [case.split_bound(prefill, 4 - prefill, 512) for prefill in (1, 2, 3)]
    assert bounds == sorted(bounds) and bounds[0] == pytest.approx(bounds[1] / 2)
    assert bounds[2] < case.bound
    assert case.split_bound(3, 1, 256) < bounds[2]  # smaller chunks are slower
