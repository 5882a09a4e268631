import pytest

from tests.kv.stream.world import StreamWorld


@pytest.fixture
def world():
    world = StreamWorld()
    yield world
    world.close()
