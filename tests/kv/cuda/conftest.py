import pytest

from tests.kv.cuda.world import CudaWorld


@pytest.fixture
def world(tmp_path):
    world = CudaWorld(tmp_path)
    yield world
    world.close()
