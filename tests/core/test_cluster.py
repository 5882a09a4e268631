"""The promises of a whole cluster under faults, over many seeds. TETRI_SEEDS=5000 asks for more of them;
TETRI_FIRST_SEED for others."""

import os
import re
from collections import Counter
from dataclasses import replace

import pytest

from tests.core.cluster import Cluster
from tests.core.shapes import PREDICTORS, Faults, Shape
from tetri.core.decode.kv_receive import COUNTED

SEEDS = int(os.environ.get("TETRI_SEEDS", "300"))
FIRST = int(os.environ.get("TETRI_FIRST_SEED", "0"))
PARTS = 8  # a failure leaves the other parts to tell more


def test_without_faults_every_request_gets_its_tokens():
    for seed in range(10):
        story = Cluster(seed, Faults(), Shape.some(seed)).run()
        assert story.broker.core.counters["restarts"] == 0


def test_every_kind_of_wrong_chunk_is_met():
    """What the stories below are worth: each counter counts, and KV comes over both paths."""
    counted, paths = Counter(), Counter()
    for seed in range(24):  # the rarest is met a few times
        wrong = {"corrupt": 0.5, "lose": 0.1, "shorten": 0.1, "mangle": 0.1, "replay": 0.8, "overtake": 0.4}
        faults = Faults(**wrong, delay=0.3, kills=0.5)
        story = Cluster(seed, faults, replace(Shape.some(seed), far=True, decodes=1)).run()
        for worker in story.workers:
            counted.update(worker.core.decode.kv_receive.counters)
        paths.update(client.done.receipt.transport for client in story.clients.values())
    assert all(counted[name] for name in COUNTED), dict(counted)
    assert paths["local"] and paths["stream"]


@pytest.mark.parametrize("part", range(PARTS))
def test_under_faults_every_request_gets_its_tokens_and_all_memory_comes_back(part):
    for seed in range(FIRST + part, FIRST + SEEDS, PARTS):
        Cluster(seed, Faults.some(seed), Shape.some(seed)).run()


@pytest.mark.parametrize("expects", PREDICTORS)
def test_predictions_that_come_in_time_late_or_never_hold_nobody_up(expects):
    """And what these stories are worth: of each kind that can be some come in time, some late, and some correct."""
    counted: Counter[str] = Counter()
    for seed in range(9):
        faults = replace(Faults.some(seed), mute=(0.0, 0.5, 1.0)[seed % 3])
        log: list[str] = []
        story = Cluster(seed, faults, Shape.some(seed).learning(expects, length_wait_s=0.01), log).run()
        counted["foreseen"] += sum(": LengthUpdate(" in line for line in log)
        for status in [worker.core.estimator.status() for worker in story.workers]:
            assert status.kind == expects and status.right <= status.scored <= status.predicted
            counted.update(late=status.late, predicted=status.predicted, scored=status.scored)
    none = {"late", "predicted", "scored", "foreseen"} if expects == "prior" else set()
    assert {name for name in ("late", "predicted", "scored", "foreseen") if not counted[name]} == none, counted


def test_every_message_is_one_that_the_wire_carries():
    for seed in range(8):
        Cluster(seed, Faults.some(seed), Shape.some(seed), wire=True).run()


def test_a_seed_tells_the_same_story_again():
    first, again = [], []
    for log in (first, again):
        Cluster(5, Faults.some(5), Shape.some(5), log).run()
    assert _anonymous(first) == _anonymous(again)


def _anonymous(log):
    """Without the names of the stores, which are drawn from the system's own chance."""
    return [re.sub(r"-[0-9a-f]{16}\b", "", line).split("segment='")[0] for line in log]
