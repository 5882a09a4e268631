"""Coupled engines in virtual time, against times computed by hand."""

from dataclasses import replace
from functools import partial
from itertools import pairwise
from random import Random

import pytest

from tetri.cost import Cost
from tetri.policy.coupled import COUPLED, CoupledLimits
from tetri.sim import coupled
from tetri.sim.coupled import Receiver
from tetri.sim.traces import Arrival

# A chunk takes 0.01 s a token, a decode step 1 s, a context token nothing.
COST = Cost(prefill=((100.0, 1.0), (200.0, 2.0)), decode=((1.0, 1.0),))
ROOMY = CoupledLimits(slots=16, step_tokens=400, kv_tokens=10_000)


def batch(*lengths):
    return [Arrival(0.0, prompt, output) for prompt, output in lengths]


LATER = [Arrival(0.0, 100, 4), Arrival(0.5, 200, 1)]


@pytest.mark.parametrize(
    ("rule", "limits", "arrivals", "join_s", "right"),
    [
        # prompts are merged, then decoded
        ("prefill_first", {}, batch((100, 1), (200, 3), (100, 2)), 0, [(4, 4, 0), (4, 6, 0), (4, 5, 0)]),
        # two prompts: 2.5 s; one step: 3.5; the third prompt: 6.0, with no token for the second; one step: 7.0
        (
            *("prefill_first", {"slots": 2}, batch((100, 2), (100, 3), (200, 1))),
            *(0.5, [(2.5, 3.5, 0), (2.5, 7, 0), (6, 6, 0)]),
        ),
        # the first prompt to 1.0; then twice a chunk of 100 beside a decode: 1 + 1 s, of which 1 s is paid once
        ("chunked", {"step_tokens": 101}, LATER, 0, [(1, 4, 0), (2.5, 2.5, 0)]),
        # an arrival is seen at the next step of a long decode
        ("prefill_first", {}, [Arrival(0.0, 100, 10), Arrival(3.5, 100, 1)], 0, [(1, 11, 0), (1.5, 1.5, 0)]),
        # Both prompts to 2.0, two steps to 4.0 hold 204 tokens; the third has no room for both. The first goes on and
        # ends with 105 tokens at 7.0; 103 tokens are computed again to 8.03, and yield the fourth.
        ("prefill_first", {"kv_tokens": 205}, batch((100, 6), (100, 4)), 0, [(2, 7, 0), (2, 8.03, 1)]),
    ],
)
def test_first_token_end_and_preemptions_of_each(rule, limits, arrivals, join_s, right):
    served = coupled.run(rule, replace(ROOMY, **limits), COST, arrivals, join_s=join_s).served
    assert [(round(each.ttft_s, 6), round(each.jct_s, 6), each.preempted) for each in served] == right


def test_replicas_share_the_requests():
    outcome = coupled.run("chunked", ROOMY, COST, batch(*[(100, 5)] * 6), replicas=2)
    assert [request.replica for request in outcome.served] == [0, 1, 0, 1, 0, 1]
    assert len(outcome.busy) == 2 and outcome.busy[0] == outcome.busy[1]


def test_a_route_chooses_the_replica_and_sees_what_is_queued_and_spare():
    seen = []

    def route(engines, request):
        engines[1].advance(request.at_s)
        seen.append((engines[1].queued(request.at_s), engines[1].spare))
        return 1

    arrivals = [Arrival(0.0, 100, 5), Arrival(0.5, 200, 1), Arrival(1.5, 100, 1)]
    outcome = coupled.run("chunked", ROOMY, COST, arrivals, replicas=2, route=route)
    assert [request.replica for request in outcome.served] == [1, 1, 1] and not outcome.busy[0]
    # The first prompt ends at 1 s; the second is computed beside a decode until 3 s, and counts until then.
    # It has no output to come, so that its memory is spare.
    assert seen == [(0, 10_000), (100, 9_895), (200, 9_895)]


def test_a_receiver_computes_only_what_it_preempts():
    arrivals = batch((50, 20), (50, 20))
    limits, free = CoupledLimits(16, 1000, 130), replace(COST, prefill=((1.0, 0.0),))
    make = partial(Receiver, again_s=lambda tokens: 100.0 + tokens)
    plain, made = (coupled.run("chunked", limits, free, arrivals, make=of).served for of in (coupled.Replica, make))
    assert [request.preempted for request in made] == [0, 1] == [request.preempted for request in plain]
    assert made[0].end_s == plain[0].end_s and 160 < made[1].end_s - plain[1].end_s < 170


def test_new_prompts_leave_memory_for_the_batch_to_grow():
    arrivals = [Arrival(0.0, 50, 5), Arrival(0.1, 60, 5)]
    limits, free = CoupledLimits(16, 1000, 130), replace(COST, prefill=((1.0, 0.0),))
    made = [coupled.run("chunked", limits, free, arrivals, make=partial(Receiver, kept=n)).served for n in (0, 20)]
    assert made[0][1].first_s == 2.0 and made[1][1].first_s == 4.0 == made[1][0].end_s


@pytest.mark.parametrize("rule", COUPLED)
@pytest.mark.parametrize("seed", range(12))
def test_every_request_ends_with_all_its_tokens_and_all_memory_comes_back(rule, seed):
    rng = Random(f"{rule} {seed}")
    limits = CoupledLimits(rng.choice((1, 3, 16)), rng.choice((50, 300)), rng.choice((130, 200, 5000)))
    arrivals, at = [], 0.0
    for _ in range(60):
        at += rng.choice((0.0, 0.7, 30.0))
        arrivals.append(Arrival(at, rng.randint(1, 70), rng.randint(1, 60)))
    engine = coupled.Replica(rule, limits, COST)
    served = [coupled.CoupledRequest(each.at_s, each.prompt, each.output) for each in arrivals]
    for request in served:
        engine.advance(request.arrival_s)
        engine.add(request)
    engine.advance(float("inf"))
    assert all(
        request.made == request.output and request.arrival_s < request.first_s <= request.end_s < float("inf")
        for request in served
    )
    assert engine.open == 0 and engine._free == limits.kv_tokens
    assert all(before[1] < after[0] for before, after in pairwise(engine.busy))  # neighbours are joined
    if limits.kv_tokens == 5000:
        assert sum(request.preempted for request in served) == 0
    elif limits.slots > 1:
        assert sum(request.preempted for request in served) > 0


@pytest.mark.parametrize("wrong", [Arrival(0.0, 0, 1), Arrival(0.0, 1, 0), Arrival(0.0, 9_999, 2), Arrival(-1.0, 1, 1)])
def test_a_request_that_can_never_run_is_refused_in_one_line(wrong):
    with pytest.raises(ValueError, match="request 1") as caught:
        coupled.run("chunked", ROOMY, COST, [wrong])
    assert "\n" not in str(caught.value)
