"""Decode instances that cannot read KV, and paths that are cut while all messages pass: no request ends in an error
while another instance can be reached, most work goes there, and few requests find out whether the bad one is well."""

from collections import Counter
from dataclasses import replace
from random import Random

import pytest

from tests.sim.shapes import SETUP, cost
from tetri.faults import parse_cuts
from tetri.request import Sampling
from tetri.sim.faulty.chance import Faults
from tetri.sim.faulty.world import FaultyWorld
from tetri.sim.setup import Timeouts
from tetri.sim.traces import Arrival

PATIENCE_S = 10.0
SLOW = replace(  # live rates of messages, and prompts of up to four chunks
    SETUP,
    cost=cost(0.004),
    link_bytes_s=1e5,
    block_tokens=4,
    kv_tokens=640,
    chunk_tokens=16,
    max_batch=8,
    context=80,
    slots=60,
    kv_paths=(("stream",),),
    load_s=0.1,
    stale_s=1.0,
    heartbeat_s=0.2,
    warm_s=1.0,
    limit_s=float("inf"),
    timeouts=Timeouts(patience_s=PATIENCE_S, max_attempts=8),
)


class Run:
    """Requests at this rate a second, and what came of them."""

    def __init__(self, cuts, rate=20, requests=160, prefill=2, decode=2):
        rng, sampling = Random(1), Sampling(max_tokens=8, ignore_eos=True)
        arrivals = [Arrival(at / rate, rng.randint(1, 60), 8, sampling=sampling) for at in range(requests)]
        setup = replace(SLOW, prefill=prefill, decode=decode)
        self.world = FaultyWorld(setup, arrivals, Faults(until=0.0), cuts=parse_cuts(cuts))
        self.world.run()
        outcomes = self.world.clients.outcomes
        self.errors = Counter(outcome.why for outcome in outcomes if outcome.state == "failed")
        self.attempts = Counter(outcome.attempts for outcome in outcomes)
        self.most_attempts = max(self.attempts)
        self.decoded = Counter(client.done.receipt.decode_instance for client in self.world.clients.clients)
        workers = self.world.workers.values()
        self.unread = sum(sum(each.core.dispatcher.readers.counters.values()) for each in workers)


@pytest.mark.parametrize("kind, rate", [("", 20), ("flip:", 80)])
def test_of_two_decode_instances_one_that_cannot_read_costs_few_requests_a_moment_and_no_attempt(kind, rate):
    run = Run(f"{kind}d0", rate, requests=480)
    assert (run.errors, run.most_attempts, run.decoded) == ({}, 1, {"d1": 480})
    assert 2 <= run.unread < 20


def test_nor_does_one_that_turns_bad_with_kv_on_its_way_to_it():
    run = Run("d0@1-1000", 80)
    assert not run.errors and run.most_attempts <= 2 and run.unread < 40 and run.decoded["d0"] > 20


def test_one_that_is_well_again_gets_its_share():
    run = Run("d0@0-3")
    assert not run.errors and run.most_attempts == 1 and run.unread < 20
    assert run.decoded["d0"] > 20  # of the 100 requests after that


def test_a_cut_path_is_a_matter_of_its_pair():
    run = Run("p0>d0, p1>d1", 80)
    assert (run.errors, run.most_attempts) == ({}, 1) and min(run.decoded.values()) > 40 and run.unread < 30


def test_what_one_prefill_instance_cannot_get_to_anybody_another_one_can():
    """Its bytes are wrong, or nobody reaches it. It gets a request now and then."""
    for cuts in ("p0>d0, p0>d1", "flip:p0>d0, flip:p0>d1"):
        run = Run(cuts, 40)
        assert not run.errors and run.most_attempts == 2 and run.attempts[2] < 20, cuts


def test_many_prefill_instances_do_not_all_try_a_bad_one():
    run = Run("d0", 40, prefill=12)
    assert (run.errors, run.most_attempts, run.decoded) == ({}, 1, {"d1": 160}) and run.unread < 30


def test_the_only_path_that_is_cut_ends_requests_by_patience_with_the_reason():
    run = Run("d0", 20, requests=40, prefill=1, decode=1)
    why = f"no decode instance could read KV of p0 for {PATIENCE_S:g} s (d0: chunk 0 is lost)"
    assert run.errors == {why: 40} and run.most_attempts <= 2 and run.unread < 30
    ends = [client.done.jct_s for client in run.world.clients.clients]
    assert min(ends) < PATIENCE_S + 1.0 and max(ends) < PATIENCE_S + 3.0


def test_the_only_path_that_is_cut_for_less_than_the_patience_loses_nobody():
    run = Run("d0@0-7", 20, requests=40, prefill=1, decode=1)
    assert not run.errors and run.most_attempts <= 2 and run.decoded == {"d0": 40}
