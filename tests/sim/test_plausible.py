"""The simulator against queueing theory and plain arithmetic: what anybody would work out on paper comes out."""

from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest

from tetri.cost import Cost
from tetri.policy.rules import Rules
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


def test_one_prefill_instance_is_an_m_d_1_queue():
    """At a load of 0.8, waiting times follow Lindley's recursion to the microsecond."""
    arrivals = list(drawn(2000, PROMPT, ONE, seed=3, rate=0.8 / S))
    expected = [0.0]
    for before, after in pairwise(arrivals):
        expected.append(max(0.0, expected[-1] + S - (after.at_s - before.at_s)))
    waits = [outcome.ttft_s - 2 * L - S for outcome in served(SETUP, arrivals).outcomes]
    assert waits == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("batch", [1, 64])
def test_a_full_batch_writes_as_fast_as_the_table_says(batch):
    """Prompts are next to nothing, so that all decode together: TPOT is the step of that batch."""
    made = served(replace(SETUP, max_batch=batch), [Arrival(0.0, 1, 2001)] * batch)
    step_s = COST.decode_s(batch, 0)
    assert [outcome.tpot_s for outcome in made.outcomes] == pytest.approx([step_s] * batch, rel=0.01)
    assert made.counters["decode_tokens"] / made.end_s == pytest.approx(batch / step_s, rel=0.01)


def test_four_instances_take_a_quarter_of_the_time():
    prompts = [Arrival(0.0, 512, 1)] * 64
    assert served(replace(SETUP, prefill=4), prompts).end_s == pytest.approx(64 * S / 4, rel=0.01)
    outputs = [Arrival(0.0, 1, 101)] * 64
    spread = served(replace(SETUP, decode=4, rules=Rules(decode_route="least_loaded")), outputs)
    assert spread.end_s == pytest.approx(100 * COST.decode_s(64 // 4, 0), rel=0.05)


def test_ageing_lets_nobody_pass_who_came_too_late():
    rng = Random(5)
    times = [each.at_s for each in drawn(600, ONE, ONE, seed=5, rate=9.3)]
    arrivals = [Arrival(at_s, 4096 if rng.random() < 0.1 else 128, 1) for at_s in times]  # nine short, one long
    made = served(replace(SETUP, rules=Rules(order="ageing", stretch=4.0)), arrivals).outcomes
    passed = 0
    for place, one in enumerate(made):
        patience = 4.0 * COST.prompt_s(one.arrival.prompt, 0, 512)
        for other in made[place + 1 :]:
            if other.arrival.at_s + other.ttft_s < one.arrival.at_s + one.ttft_s:
                passed += 1
                assert other.arrival.at_s - one.arrival.at_s <= patience
    assert passed > 100
