import pytest

from tests.kv.cuda.world import CudaWorld


@pytest.fixture
def world(tmp_path):
    world = CudaWorld(tmp_path)
    yield world
    world.close()


@pytest.fixture
def pair(world):
    """(sender, receiver), the receiver knows the sender."""
    sender, receiver = world.open("p0"), world.open("d0")
    receiver.meet(sender)
    return sender, receiver
