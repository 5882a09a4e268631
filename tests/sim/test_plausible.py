"""The simulator against queueing theory and plain arithmetic: what anybody would work out on paper comes out."""

from dataclasses import replace
from itertools import pairwise
from random import Random
from statistics import fmean

import pytest

from tetri.cost import Cost
from tetri.policy.rules import Rules
from tetri.policy.views import FlipSettings
from tetri.sim.setup import Setup
from tetri.sim.traces import Arrival, TokenCounts, drawn
from tetri.sim.world import World

L = 0.0005
S = 0.1  # seconds of a chunk of 512
COST = Cost(
    prefill=((0.0, 0.0), (512.0, S)),
    decode=((1.0, 0.02), (64.0, 0.083)),  # 19 ms and 1 ms for each request
    kv_token_bytes=1000,
    kv_tokens=200_000,
    chunk_tokens=512,
)
SETUP = Setup(COST, link_latency_s=L, max_batch=64)
PROMPT, ONE = TokenCounts.parsed("512"), TokenCounts.parsed("1")


def served(setup, arrivals):
    return World(setup, arrivals).run()


def waits(setup, arrivals):
    """Seconds before each request's own prefill."""
    return [outcome.ttft_s - 2 * L - S for outcome in served(setup, arrivals).outcomes]


# ---------------------------------------------------------------- one queue


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_prefill_instance_is_an_m_d_1_queue(load):
    """Waiting times follow Lindley's recursion to the microsecond and, on average, Pollaczek and Khinchine."""
    arrivals = list(drawn(2000, PROMPT, ONE, seed=3, rate=load / S))
    expected, wait = [], 0.0
    for before, after in pairwise([None, *arrivals]):
        wait = max(0.0, wait + S - (after.at_s - before.at_s)) if before else 0.0
        expected.append(wait)
    found = waits(SETUP, arrivals)
    assert found == pytest.approx(expected, abs=1e-6)
    assert fmean(found) == pytest.approx(load * S / (2 * (1 - load)), rel=0.2)


def test_an_instance_is_busy_as_long_as_its_work_takes():
    arrivals = list(drawn(500, PROMPT, TokenCounts.parsed("2-40"), seed=1, rate=4.0))
    made = served(SETUP, arrivals)
    assert sum(made.instances["p0"].busy_s.values()) == pytest.approx(500 * S)
    assert sum(made.instances["d0"].busy_s.values()) < made.end_s


def test_bursts_wait_longer_and_two_instances_much_less():
    calm, bursty = (list(drawn(1000, PROMPT, ONE, 1, 6.0, burstiness)) for burstiness in (0.5, 2.0))
    one, two = fmean(waits(SETUP, bursty)), fmean(waits(replace(SETUP, prefill=2), bursty))
    assert fmean(waits(SETUP, calm)) < 0.3 * one and two < 0.5 * one


# ---------------------------------------------------------------- steps


@pytest.mark.parametrize("batch", [1, 8, 64])
def test_a_full_batch_writes_as_fast_as_the_table_says(batch):
    """Prompts are next to nothing, so that all decode together: TPOT is the step of that batch."""
    made = served(replace(SETUP, max_batch=batch), [Arrival(0.0, 1, 2001)] * batch)
    step_s = COST.decode_s(batch, 0)
    assert [outcome.tpot_s for outcome in made.outcomes] == pytest.approx([step_s] * batch, rel=0.01)
    assert made.counters["decode_tokens"] / made.end_s == pytest.approx(batch / step_s, rel=0.01)


def test_more_requests_than_slots_go_in_waves():
    made = served(replace(SETUP, max_batch=32), [Arrival(0.0, 1, 101)] * 96)
    assert made.end_s == pytest.approx(3 * 100 * COST.decode_s(32, 0), rel=0.02)


@pytest.mark.parametrize("many", [2, 4])
def test_so_many_instances_take_so_much_less_time(many):
    prompts = [Arrival(0.0, 512, 1)] * 64
    assert served(replace(SETUP, prefill=many), prompts).end_s == pytest.approx(64 * S / many, rel=0.01)
    outputs = [Arrival(0.0, 1, 101)] * 64
    spread = served(replace(SETUP, decode=many, rules=Rules(decode_route="least_loaded")), outputs)
    assert spread.end_s == pytest.approx(100 * COST.decode_s(64 // many, 0), rel=0.05)


def test_ttft_does_not_depend_on_decode_but_for_coupled_instances():
    def ttfts(setup, output):
        arrivals = [Arrival(0.5 * number, 512, output) for number in range(60)]
        return [outcome.ttft_s for outcome in served(setup, arrivals).outcomes]

    assert ttfts(SETUP, 2) == pytest.approx(ttfts(SETUP, 400), abs=1e-9)
    both = replace(SETUP, prefill=0, decode=0, mixed=1)
    assert fmean(ttfts(both, 400)) > 1.05 * fmean(ttfts(both, 2))


# ---------------------------------------------------------------- policies do what they are for


def heavy_tailed(requests, rate):
    """Nine short prompts to one long one."""
    rng = Random(5)
    times = [each.at_s for each in drawn(requests, ONE, ONE, seed=5, rate=rate)]
    return [Arrival(at_s, 4096 if rng.random() < 0.1 else 128, 1) for at_s in times]


def test_ageing_lies_between_first_come_and_shortest_first():
    """With no stretch it is the one, with endless stretch the other, whose long prompts starve."""
    arrivals = heavy_tailed(1000, 9.3)  # at 95 % load
    stretched = {0.0: [], 4.0: [], 1e6: []}
    for stretch, ttfts in stretched.items():
        setup = replace(SETUP, rules=Rules(order="ageing", stretch=stretch))
        ttfts += [outcome.ttft_s for outcome in served(setup, arrivals).outcomes]
    come, aged, shortest = stretched.values()
    assert fmean(shortest) < fmean(aged) < fmean(come)
    assert max(come) < max(aged) < max(shortest)
    came = served(replace(SETUP, rules=Rules(order="fcfs")), arrivals)
    assert come == pytest.approx([outcome.ttft_s for outcome in came.outcomes])


def test_ageing_lets_nobody_pass_who_came_too_late():
    arrivals = heavy_tailed(600, 9.3)
    made = served(replace(SETUP, rules=Rules(order="ageing", stretch=4.0)), arrivals).outcomes
    passed = 0
    for place, one in enumerate(made):
        patience = 4.0 * COST.prompt_s(one.arrival.prompt, 0, 512)
        for other in made[place + 1 :]:
            if other.arrival.at_s + other.ttft_s < one.arrival.at_s + one.ttft_s:
                passed += 1
                assert other.arrival.at_s - one.arrival.at_s <= patience
    assert passed > 100


def test_deadline_order_meets_more_deadlines():
    rng = Random(1)
    arrivals = [replace(each, deadline_s=rng.choice((0.6, 6.0))) for each in drawn(600, PROMPT, ONE, 2, rate=9.0)]
    met = {}
    for order in ("fcfs", "deadline"):
        made = served(replace(SETUP, rules=Rules(order=order)), arrivals)
        met[order] = sum(outcome.state == "done" for outcome in made.outcomes)
    assert met["deadline"] > met["fcfs"] + 50


def test_flips_follow_a_workload_that_shifts():
    """Half a minute of long prompts, then of long outputs."""
    first = list(drawn(300, TokenCounts.parsed("2048"), TokenCounts.parsed("4"), seed=1, rate=10.0))
    then = drawn(600, TokenCounts.parsed("32"), TokenCounts.parsed("200"), seed=2, rate=25.0)
    arrivals = [*first, *(replace(each, at_s=each.at_s + first[-1].at_s) for each in then)]
    settings = FlipSettings(hold_s=2.0)
    jct = {}
    for flip in ("none", "balance"):
        setup = replace(SETUP, prefill=3, decode=3, flip=flip, flip_settings=settings)
        made = served(setup, arrivals)
        jct[flip] = fmean(outcome.jct_s for outcome in made.outcomes)
    assert jct["balance"] < 0.8 * jct["none"]
