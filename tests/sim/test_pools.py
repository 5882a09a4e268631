"""The pool of each role, against the live cores and plain arithmetic."""

from dataclasses import replace
from math import inf
from random import Random

import pytest

from tetri import cost
from tetri.cost import Cost
from tetri.metrics import percentile
from tetri.policy.coupled import CoupledLimits
from tetri.sim import pools
from tetri.sim.coupled import Replica
from tetri.sim.pools import Demand, Goal, Served, below, counted, least_queued, power_of_two, sampled, settled
from tetri.sim.setup import Setup
from tetri.sim.traces import Arrival, TokenCounts
from tetri.sim.world import World

L = 0.0005
# A chunk of 100 takes 1 s, a step of n requests 0.09 + 0.01 n.
TABLE = Cost(prefill=((0.0, 0.0), (100.0, 1.0)), decode=((1.0, 0.1), (101.0, 1.1)), kv_token_bytes=1000)
SETUP = Setup(TABLE, kv_tokens=16_000, chunk_tokens=100, max_batch=50, link_latency_s=L)
GOAL = Goal(rate=2.0, ttft_s=10.0, tpot_s=0.2)
V100 = Setup(cost.load("v100-opt13b"), link_bytes_s=25e9)


def demand(goal=GOAL, setup=SETUP, lengths=((200, 11),), seed=0):
    return Demand(goal, setup, lengths, seed)


def live(asked, requests, **instances):
    """The outcomes that count, of the live cores."""
    arrivals = asked.arrivals(asked.goal.rate, requests)
    return counted(World(replace(asked.setup, **instances), arrivals).run().outcomes)


def test_arrivals_have_the_rate_and_the_lengths_and_the_same_seed_gives_the_same():
    lengths = [(10, 1), (20, 2)]
    made = list(demand(lengths=lengths).arrivals(4.0, 4000))
    assert made[-1].at_s == pytest.approx(1000) and [each.prompt for each in made].count(10) == 2000
    assert {(each.prompt, each.output) for each in made} == {*lengths}
    assert made == list(demand(lengths=lengths).arrivals(4.0, 4000))
    assert made != list(demand(lengths=lengths, seed=1).arrivals(4.0, 4000))


def test_one_request_by_itself():
    slow = replace(SETUP, link_bytes_s=100_000.0)  # 1 s for a chunk
    assert demand().prompt_s(250) == pytest.approx(2.5 + 2 * L)
    assert demand().handover_s(250) == L
    assert demand(setup=slow).handover_s(250) == pytest.approx(1.0 + L)
    assert demand(setup=replace(slow, transfer="request")).handover_s(250) == pytest.approx(2.5 + L)
    slower = replace(slow, link_bytes_s=50_000.0)  # the first chunk is there after 1 s, then 5 s for all of them
    assert demand(setup=slower).handover_s(250) == pytest.approx(1 + 5 - 2.5 + L)
    assert demand().least_tpot_s(250, 11) == pytest.approx(0.1 + L / 10)


def test_the_load_in_instances():
    asked = demand()
    assert asked.prefill_load == pytest.approx(2.0 * 2.0)
    # Steps of at most 0.2 s have a batch of 11: 2 requests a second x 10 steps x 0.2 s / 11.
    assert (asked.decode_load, asked.decode_bound) == (pytest.approx(2 * 10 * 0.2 / 11), "tpot")
    wide = demand(goal=replace(GOAL, tpot_s=1.0))
    assert (wide.decode_load, wide.decode_bound) == (pytest.approx(2 * 10 * 0.59 / 50), "max_batch")
    small = demand(goal=replace(GOAL, tpot_s=1.0), setup=replace(SETUP, kv_tokens=5 * 208))
    assert (small.decode_load, small.decode_bound) == (pytest.approx(2 * 10 * 0.14 / 5), "kv_memory")
    linked = demand(setup=replace(SETUP, link_bytes_s=200_000.0))  # 1 s for each prompt
    assert (linked.decode_load, linked.decode_bound) == (pytest.approx(2.0), "link")
    # Of 8 instances 4 compute prompts, and so the steps of 0.1 s take 0.2 s; of 7 more.
    assert asked.coupled_load == 7
    assert demand(lengths=[(200, 1)]).decode_load == 0.0


@pytest.mark.parametrize(("rate", "instances"), [(7, 1), (40, 5)])
def test_prefill_takes_as_long_as_with_the_live_cores(rate, instances, monkeypatch):
    monkeypatch.setattr(pools, "REQUESTS", 600)
    lengths = sampled(TokenCounts.parsed("100-500"), TokenCounts.parsed("1"), 0)
    asked = demand(Goal(rate, 1.0, 1.0), V100, lengths)
    times = [outcome.ttft_s for outcome in live(asked, 600, prefill=instances)]
    assert asked.prefill(instances).ttft_s == pytest.approx(percentile(times, 0.9), rel=0.05)


@pytest.mark.parametrize(("output", "decode", "link"), [("20-60", 4, 25e9), ("4", 1, 25e9), ("4", 2, inf)])
def test_decode_takes_as_long_as_with_the_live_cores(output, decode, link, monkeypatch):
    monkeypatch.setattr(pools, "REQUESTS", 400)
    lengths = sampled(TokenCounts.parsed("100"), TokenCounts.parsed(output), 0)
    asked = demand(Goal(40, 1.0, 1.0), replace(V100, link_bytes_s=link), lengths)
    times = [outcome.tpot_s for outcome in live(asked, 400, prefill=4, decode=decode)]
    assert asked.decode(decode, prefill=4).tpot_s == pytest.approx(percentile(times, 0.9), rel=0.05)


def test_a_pool_that_falls_behind_is_not_simulated():
    assert demand().prefill(4) == Served(4, ttft_s=inf)
    assert demand().coupled(4) == Served(4, inf, inf)
    busy = demand(goal=replace(GOAL, rate=20.0, tpot_s=1.0))
    assert busy.decode(2, 41) == Served(2, tpot_s=inf) and busy.decode(3, 41).tpot_s < inf
    assert demand(setup=replace(SETUP, link_bytes_s=200_000.0)).decode(2, 5).tpot_s == inf


def test_what_is_busy_and_held(monkeypatch):
    monkeypatch.setattr(pools, "REQUESTS", 1500)
    assert demand().prefill(8).busy == pytest.approx(4 / 8, rel=0.1)
    made = demand().decode(2, 5)
    assert made.batch == pytest.approx(2.0 / 2 * 10 * made.tpot_s, rel=0.3)
    assert made.memory == pytest.approx(made.batch * 205.5 / 16_000)
    assert demand(lengths=[(200, 1)]).decode(1, 5) == Served(1, tpot_s=0.0, busy=0.0, batch=0.0, memory=0.0)
    both = demand().coupled(8)
    assert both.ttft_s > 2.0 and both.tpot_s > 0.1 and 0.5 < both.busy < 1.0


def test_a_large_pool_is_simulated_as_a_share_of_it(monkeypatch):
    monkeypatch.setattr(pools, "REQUESTS", 600)
    monkeypatch.setattr(pools, "POOL", 2)
    monkeypatch.setattr(pools, "PROMPT_POOL", 6)
    small, large = demand(replace(GOAL, rate=2.0)), demand(replace(GOAL, rate=20.0))
    assert large.decode(20, 50) == replace(small.decode(2, 5), instances=20)
    assert large.prefill(60) == replace(small.prefill(6), instances=60)
    assert large.coupled(80).tpot_s == small.coupled(8).tpot_s


def replicas(count):
    return [Replica("chunked", CoupledLimits(50, 100, 1000), TABLE) for _ in range(count)]


def test_prompts_go_where_the_fewest_tokens_wait():
    engines = replicas(2)
    for tokens in (300, 100, 100):
        column = least_queued(engines, Arrival(0.0, tokens, 1))
        engines[column].add(pools.coupled.CoupledRequest(0.0, tokens, 1))
    assert [engine.queued(0.0) for engine in engines] == [300, 200]
    # At 1.5 s the second prompt of the second is being computed: it has not ended.
    assert least_queued(engines, Arrival(1.5, 1, 1)) == 1
    assert [engine.queued(1.5) for engine in engines] == [300, 100]


def add(engines, column, tokens):
    engines[column].add(pools.coupled.CoupledRequest(0.0, tokens, 5))


def test_outputs_go_to_one_of_two_with_more_memory_to_spare():
    engines, route = replicas(2), power_of_two(Random(0), 1, 0.0)
    add(engines, 0, 50)
    assert route(engines, Arrival(0.0, 50, 5)) == 1
    add(engines, 1, 50)
    add(engines, 1, 50)
    assert route(engines, Arrival(0.0, 50, 5)) == 0
    add(engines, 0, 900)
    assert [engine.spare for engine in engines] == [1000 - 55 - 905, 1000 - 2 * 55]
    assert route(engines, Arrival(0.0, 50, 5)) == 1  # the first has no memory for it
    assert route(engines, Arrival(0.0, 950, 5)) == 1  # nor has the second, but it has more
    assert route(engines[:1], Arrival(0.0, 50, 5)) == 0


def test_a_dispatcher_knows_what_it_has_sent_and_the_last_report():
    engines, route = replicas(2), power_of_two(Random(0), 1, 1.0)
    add(engines, 0, 50)
    assert [route(engines, Arrival(0.0, 100, 5)), route(engines, Arrival(0.5, 1, 5))] == [1, 0]
    add(engines, 0, 900)
    assert route(engines, Arrival(0.9, 1, 5)) == 0  # not reported
    assert route(engines, Arrival(1.0, 1, 5)) == 1


def test_how_far_a_percentile_is_below_a_limit():
    wave = [1.0, 2.0, 3.0, 4.0] * 8  # eight equal parts
    assert below(wave, 0.5, 3.0) > 1e6 and below(wave, 0.5, 2.0) < -1e6
    rise = [float(part) for part in range(8) for _ in range(4)]  # medians 0 to 7, which differ by 2.449
    assert below(rise, 0.5, 3.5) == 0.0
    assert below(rise, 0.5, 6.0) == pytest.approx(2.5 / 2.449, rel=0.001) == -below(rise, 0.5, 1.0)
    assert below([1.0] * 7, 0.5, 9.0) == 0.0  # too few to tell


def test_a_verdict_is_sure_if_one_limit_is_missed_or_both_are_kept_for_sure():
    noisy, low, high = [float(part) for part in range(8)], [1.0] * 8, [20.0] * 8
    sure = demand(Goal(1.0, 3.5, 3.5, share=0.5)).sure
    assert sure(low, low) and sure(low, []) and sure([], high) and sure(high, noisy)
    assert not sure(noisy, low) and not sure(low, noisy)


def test_more_requests_are_served_if_the_first_leave_it_to_chance(monkeypatch):
    monkeypatch.setattr(pools, "REQUESTS", 600)
    served = {1: Served(1, 9.9, sure=False), 5: Served(1, 10.1, sure=True)}
    assert settled(served.__getitem__) == served[5] and settled({1: served[5]}.__getitem__) == served[5]
    asked = demand(replace(GOAL, ttft_s=demand().prefill(5).ttft_s))
    assert not asked.prefill(5).sure and demand().prefill(9).sure


def test_the_start_and_the_end_of_a_run_do_not_count():
    assert counted(range(10)) == range(3, 9) and counted([7]) == [7]


@pytest.mark.parametrize(
    ("ttft_s", "tpot_s", "reached"), [(10.0, 0.2, True), (10.1, 0.2, False), (None, 0.21, False), (None, None, True)]
)
def test_the_goal_is_reached_if_both_limits_are_kept(ttft_s, tpot_s, reached):
    assert Served(1, ttft_s, tpot_s).reaches(GOAL) is reached
