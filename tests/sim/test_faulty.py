"""The promises of a whole deployment under faults, over many seeds. TETRI_SEEDS=5000 asks for more of them;
TETRI_FIRST_SEED for others. `tell(seed)` in shapes.py gives the whole story of one."""

import os
import re
from collections import Counter
from dataclasses import fields, replace
from functools import cache

import pytest

from tests.sim.shapes import FAR, PREDICTORS, some_faults, some_shape, story, tell, tight_shape
from tetri.core.decode.kv_receive import COUNTED
from tetri.sim.faulty.chance import TIMES, Faults
from tetri.wire.handover import LengthUpdate

SEEDS = int(os.environ.get("TETRI_SEEDS", "300"))
FIRST = int(os.environ.get("TETRI_FIRST_SEED", "0"))
TIGHT = SEEDS // 8
PARTS = 8  # a failure leaves the other parts to tell more


def test_without_faults_every_request_gets_its_tokens_and_its_choices_one_prefill():
    """And what these stories are worth: there are requests with several choices, and with log probabilities."""
    kinds = Counter()
    for seed in range(10):
        world = story(seed, Faults(until=0.0), some_shape(seed))
        assert world.broker.core.counters["restarts"] == 0
        assert all(outcome.attempts == 1 for outcome in world.clients.outcomes)
        clients, workers = world.clients.clients, world.workers.values()
        assert sum(worker.use.prefill_tokens for worker in workers) == sum(len(each.prompt) for each in clients)
        kinds.update((each.n > 1, each.sampling.logprobs is not None) for each in clients)
    assert len(kinds) == 4, kinds


def test_every_kind_of_wrong_chunk_is_met():
    """What the stories below are worth: each counter counts, and KV comes over both paths."""
    counted, paths = Counter(), Counter()
    for seed in range(36):  # the rarest is met a few times
        wrong = {"corrupt": 0.5, "lose": 0.1, "truncate": 0.1, "mangle": 0.1, "replay": 0.8, "overtake": 0.4}
        faults = Faults(**wrong, delay=0.3, kill=0.5, until=1.0)
        world = story(seed, faults, some_shape(seed).but(kv_paths=FAR, decode=1))
        for worker in world.workers.values():
            counted.update(worker.core.decode.hand_overs.kv_receive.counters)
        paths.update(client.done.receipt.transport for client in world.clients.clients)
    assert all(counted[name] for name in COUNTED), dict(counted)
    assert paths["local"] and paths["stream"]


@cache
def injected_by(seed):
    """The number of faults of each kind in the story of a seed, which must end well."""
    return story(seed, some_faults(seed), some_shape(seed)).chance.counts


@pytest.mark.parametrize("part", range(PARTS))
def test_under_faults_every_request_gets_its_tokens_and_all_memory_comes_back(part):
    for seed in range(FIRST + part, FIRST + SEEDS, PARTS):
        injected_by(seed)


def test_every_kind_of_fault_happens():
    """What the stories above are worth."""
    injected = Counter()
    for seed in range(12):
        injected.update(injected_by(seed))
    kinds = {field.name for field in fields(Faults)} - {*TIMES}
    assert {kind for kind in kinds if not injected[kind]} == set(), injected


def test_where_all_instances_do_both_requests_stay_or_are_copied():
    """What the stories are worth in which they do: KV stays in its place, and goes over each path."""
    paths = Counter()
    for seed in range(12):
        world = story(seed, some_faults(seed), some_shape(seed).but(prefill=0, decode=0, mixed=1, auto=2, kv_paths=FAR))
        for client in world.clients.clients:
            receipt = client.done.receipt
            paths["in place" if receipt.local and receipt.decode_instance else receipt.transport] += 1
    assert all(paths[name] for name in ("in place", "local", "stream")), paths


@pytest.mark.parametrize("expects", PREDICTORS)
def test_predictions_that_come_in_time_late_or_never_hold_nobody_up(expects):
    """And what these stories are worth: of each kind that can be some come in time, some late, and some correct."""
    counted: Counter[str] = Counter()
    for seed in range(36):  # LengthUpdates are the rarest: an instance that does both corrects itself without
        faults = replace(some_faults(seed), mute=(0.0, 0.5, 1.0)[seed % 3])
        world = story(seed, faults, some_shape(seed).learning(expects, length_wait_s=0.01))
        messages = [message for recent in world.wiring.recent.values() for message in recent]
        counted["foreseen"] += sum(isinstance(message, LengthUpdate) for message in messages)
        for status in [worker.core.estimator.status() for worker in world.workers.values()]:
            assert status.kind == expects and status.right <= status.scored <= status.predicted
            counted.update(late=status.late, predicted=status.predicted, scored=status.scored)
    kinds = {"late", "predicted", "scored", "foreseen"}
    assert {kind for kind in kinds if counted[kind]} == (set() if expects == "prior" else kinds), counted


@pytest.mark.parametrize("part", range(2))
def test_with_little_of_both_and_no_faults_nothing_is_computed_twice(part):
    for seed in range(FIRST + part, FIRST + TIGHT, 2):
        world = story(seed, Faults(until=0.0), tight_shape(seed))
        restarts, limit = world.broker.core.counters["restarts"], 5.0
        assert restarts == 0 and world.kernel.now < limit, f"seed {seed}: {world.kernel.now} s"


def test_with_little_of_both_and_faults_everything_ends():
    for seed in range(FIRST, FIRST + TIGHT // 2):
        story(seed, some_faults(seed), tight_shape(seed))


def test_a_seed_tells_the_same_story_again():
    first, again = (_anonymous(tell(5)) for _ in range(2))
    assert first == again and len(first.splitlines()) > 1000


def _anonymous(told):
    """Without the names of the stores, which are drawn from the system's own chance."""
    return re.sub(r"segment='.*", "", re.sub(r"-[0-9a-f]{16}\b", "", told))
