"""Running requests that go on at another decode instance, in whole deployments, while everything may go wrong."""

from collections import Counter
from dataclasses import replace
from random import Random

import pytest

from tests.sim.shapes import FAR, FIRST_S, SETUP, Shape, cost, story
from tetri.request import Sampling
from tetri.sim.faulty.chance import Faults
from tetri.sim.traces import Arrival

PARTS = 4
SEEDS = 48
ODDS = {
    "drop": (0.0, 0.02, 0.2),
    "duplicate": (0.0, 0.2),
    "delay": (0.0, 0.1),
    "replay": (0.0, 0.3),
    "overtake": (0.0, 0.3),
    "mangle": (0.0, 0.05),
    "corrupt": (0.0, 0.1),
    "lose": (0.0, 0.1),
    "kill": (0.0, 0.3, 1.0),
    "freeze": (0.0, 0.3),
    "disconnect": (0.0, 0.3, 2.0),
    "cancel": (0.0, 0.2),
    "flip": (0.0, 3.0),
}


def shape(seed):
    """Long answers, and decode instances with hardly enough memory, or plenty."""
    rng = Random(f"migrating {seed}")
    setup = replace(
        SETUP,
        seed=seed,
        prefill=rng.choice((1, 2)),
        decode=rng.choice((2, 3)),
        mixed=rng.choice((0, 0, 1)),
        block_tokens=rng.choice((1, 4, 8)),
        kv_tokens=rng.choice((200, 400, 2000)),
        context=160,
        chunk_tokens=32,
        max_batch=rng.choice((2, 8)),
        slots=rng.choice((33, 50, 200)),
        link_bytes_s=rng.choice((2e3, 1e5)),
        stream_interval=rng.choice((1, 5)),
        kv_paths=FAR,
        cost=cost(0.001),
    )
    return _Long(setup, 12)


class _Long(Shape):
    def arrivals(self, seed):
        rng = Random(f"long {seed}")
        for at in sorted(rng.uniform(0.0, FIRST_S / 2) for _ in range(self.requests)):
            prompt, output = rng.randint(1, 60), rng.randint(1, 90)
            yield Arrival(at, prompt, output, sampling=Sampling(max_tokens=output, ignore_eos=rng.random() < 0.8))


def counts(world):
    receipts = [output.done.receipt for client in world.clients.clients for output in client.outputs if output.done]
    counters = world.broker.core.counters
    return Counter(
        moved=counters["migrated"],
        stayed=counters["not_migrated"],
        restarts=counters["restarts"],
        receipts=sum(receipt.migrated for receipt in receipts),
    )


def test_without_faults_each_request_is_computed_once_wherever_it_runs():
    total = Counter()
    for seed in range(16):
        world = story(seed, Faults(migrate=100.0, until=FIRST_S), shape(seed))
        total += counts(world)
        tokens = sum(worker.use.prefill_tokens for worker in world.workers.values())
        again = sum(client.outputs[0].done.receipt.recomputed for client in world.clients.clients)
        assert again or tokens == sum(len(client.prompt) for client in world.clients.clients)
    assert total["restarts"] == 0 and total["moved"] == total["receipts"] > 100, total


@pytest.mark.parametrize("part", range(PARTS))
def test_under_faults_every_request_gets_its_tokens_and_all_memory_comes_back(part):
    for seed in range(part, SEEDS, PARTS):
        rng = Random(f"faults {seed}")
        faults = {kind: rng.choice(odds) for kind, odds in ODDS.items()}
        story(seed, Faults(migrate=100.0, until=FIRST_S, **faults), shape(seed))
