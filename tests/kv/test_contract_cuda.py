"""The contract of the KV paths, over `cuda_ipc` with a stand-in for the GPU."""

import pytest

from tests.kv.contract import StoreContract
from tests.kv.contract_slab import SlabContract, slab_histories
from tests.kv.cuda_stand_in import StandIn
from tests.kv.cuda_world import CudaWorld
from tests.kv.parties import BLOCK, SLOTS
from tetri.kv.cuda.runtime import Device
from tetri.kv.cuda.slab import DeviceSlab


class TestCuda(StoreContract):
    @pytest.fixture(params=["device engine", "host engine", "two GPUs"])
    def world(self, tmp_path, request):
        world = CudaWorld(tmp_path, request.param == "host engine", 2 if request.param == "two GPUs" else 1)
        yield world
        world.close()
        assert list(world.cards.iterdir()) == []


def slab_in(folder):
    return DeviceSlab(Device(StandIn(folder)), "test", "p0", SLOTS, BLOCK, directory=str(folder))


class TestCudaSlab(SlabContract):
    @pytest.fixture
    def slab(self, tmp_path):
        slab = slab_in(tmp_path)
        yield slab
        slab.close()


def test_histories_of_a_device_slab(tmp_path):
    slab_histories(lambda: slab_in(tmp_path))("runTest").runTest()
