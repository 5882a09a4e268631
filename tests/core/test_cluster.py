"""The promises of a whole cluster under faults, over many seeds. TETRI_SEEDS=5000 asks for more of them;
TETRI_FIRST_SEED for others."""

import os

import pytest

from tests.core.cluster import Cluster
from tests.core.shapes import Faults, Shape

SEEDS = int(os.environ.get("TETRI_SEEDS", "300"))
FIRST = int(os.environ.get("TETRI_FIRST_SEED", "0"))
PARTS = 8  # a failure leaves the other parts to tell more


def test_without_faults_every_request_gets_its_tokens():
    for seed in range(10):
        story = Cluster(seed, Faults(), Shape.some(seed)).run()
        assert story.broker.core.life.counters["restarts"] == 0


@pytest.mark.parametrize("part", range(PARTS))
def test_under_faults_every_request_gets_its_tokens_and_all_memory_comes_back(part):
    for seed in range(FIRST + part, FIRST + SEEDS, PARTS):
        Cluster(seed, Faults.some(seed), Shape.some(seed)).run()


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
    return [line.split("segment='")[0] for line in log]
