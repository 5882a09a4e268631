"""Fixtures that several tests of the KV package share."""

import pytest

from tests.kv.mapped import ShmWorld
from tests.kv.parties import BLOCK, SLOTS
from tetri.kv.shm import ShmSlab


@pytest.fixture
def world(tmp_path):
    world = ShmWorld(tmp_path)
    yield world
    world.close()


@pytest.fixture
def slab(tmp_path):
    """In a folder of its own; a real file system does for shared memory."""
    slab = ShmSlab("test", "p0", SLOTS, BLOCK, directory=str(tmp_path))
    yield slab
    slab.close()


@pytest.fixture
def pair(world):
    """(sender, receiver), the receiver knows the sender."""
    return world.pair()
