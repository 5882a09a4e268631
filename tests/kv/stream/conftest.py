import pytest

from tests.kv.stream.world import StreamWorld


@pytest.fixture
def world(tmp_path):
    world = StreamWorld(tmp_path)
    yield world
    world.close()
