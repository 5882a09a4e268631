"""`cuda_ipc` on the GPUs that are there. tools/gpu_check runs these, and prints what they report."""

import statistics

import numpy
import pytest

from tests.kv.contract import StoreContract
from tests.kv.cuda import gpus
from tests.kv.cuda.process import ProcessWorld, StoreProcess, killed_sender_is_lost_and_its_successor_is_read
from tetri.kv.base import Wanted
from tetri.kv.cuda.ipc import PATH

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
CHUNK_BLOCKS = 8


def started(cuda, numbers):
    made = [StoreProcess(cuda, number) for number in numbers]
    yield made
    for process in made:
        process.stop()


@pytest.fixture(scope="module")
def on_one_gpu():
    yield from started(gpus.machine(), [0] * 4)


@pytest.fixture(scope="module")
def on_two_gpus():
    cuda = gpus.machine()
    if gpus.count() < 2:
        pytest.skip("this machine has one GPU")
    yield from started(cuda, [0, 1] * 2)


class TestOneGpu(StoreContract):
    """Processes that share a GPU."""

    @pytest.fixture
    def world(self, tmp_path, on_one_gpu):
        world = ProcessWorld(tmp_path, on_one_gpu)
        yield world
        world.close()


class TestTwoGpus(StoreContract):
    """Every other process is on the second GPU."""

    @pytest.fixture
    def world(self, tmp_path, on_two_gpus):
        probe = ProcessWorld(tmp_path, on_two_gpus[:1])
        near = probe.open("probe").store.reach.near
        probe.close()
        if not near:
            pytest.skip("the first two GPUs have no peer access to each other")
        world = ProcessWorld(tmp_path, on_two_gpus)
        yield world
        world.close()


def test_a_killed_sender_is_lost_and_its_successor_is_read(tmp_path):
    killed_sender_is_lost_and_its_successor_is_read(tmp_path, gpus.machine())


def measured(tmp_path, processes, mib, digest, check):
    size = (mib << 20) // CHUNK_BLOCKS
    world = ProcessWorld(tmp_path, processes)
    sender, receiver = world.pair(slots=CHUNK_BLOCKS, block_bytes=size, digest=digest)
    chunk = sender.put(*(numpy.random.default_rng(number).bytes(size) for number in range(CHUNK_BLOCKS)))
    assert receiver.fetch(chunk) == list(chunk.blocks), "equal before anything is timed"
    wanted = Wanted(("d", 0), "p0", PATH, chunk.handle, chunk.digest)
    fetched = statistics.median(receiver.store.process.time_takes(wanted, 30))
    plain = statistics.median(receiver.store.process.time_copies(mib << 20, 30))
    gpus.report(
        check,
        device=receiver.store.process.name(),
        chunk_mb=round((mib << 20) / 1e6, 1),
        digest=digest,
        take_ms=round(fetched * 1e3, 3),
        gbps=round((mib << 20) / fetched / 1e9, 2),
        copy_gbps=round((mib << 20) / plain / 1e9, 2),
        equal=True,
    )
    world.close()


@pytest.mark.parametrize("digest", [True, False], ids=["digest", "no digest"])
@pytest.mark.parametrize("mib", [1, 4, 12, 48])
def test_bandwidth_on_one_gpu(tmp_path, on_one_gpu, mib, digest):
    measured(tmp_path, on_one_gpu, mib, digest, "two processes, one GPU")


@pytest.mark.parametrize("digest", [True, False], ids=["digest", "no digest"])
@pytest.mark.parametrize("mib", [1, 4, 12, 48])
def test_bandwidth_between_two_gpus(tmp_path, on_two_gpus, mib, digest):
    measured(tmp_path, on_two_gpus, mib, digest, "two processes, two GPUs")
