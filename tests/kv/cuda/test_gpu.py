"""`cuda_ipc` on the GPUs that are there. tools/gpu_check runs these, and prints what they report."""

import statistics

import numpy
import pytest

from tests.kv.contract import StoreContract
from tests.kv.cuda import gpus
from tests.kv.cuda.process import ProcessWorld, StoreProcess
from tests.kv.parties import block
from tetri.kv.base import KVLost, Wanted
from tetri.kv.cuda.ipc import PATH

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
CHUNK_BLOCKS = 8


@pytest.fixture(scope="module", params=[1, 2], ids=["one GPU", "two GPUs"])
def processes(request):
    """On the GPUs in turn."""
    cuda = gpus.machine()
    if gpus.count() < request.param:
        pytest.skip("this machine has one GPU")
    made = [StoreProcess(cuda, number % request.param) for number in range(4)]
    try:
        if request.param == 2 and not made[0].near():
            pytest.skip("the first two GPUs have no peer access to each other")
        yield made
    finally:
        for process in made:
            process.stop()


class TestGpus(StoreContract):
    @pytest.fixture
    def world(self, tmp_path, processes):
        world = ProcessWorld(tmp_path, processes)
        yield world
        world.close()


def test_a_killed_sender_is_lost_and_its_successor_is_read(tmp_path):
    first, receiver, second = processes = [StoreProcess(gpus.machine()) for _ in range(3)]
    world = ProcessWorld(tmp_path, processes)
    try:
        sender, reader = world.pair()
        chunk = sender.put(block(1), block(2))
        assert reader.fetch(chunk) == [block(1), block(2)]
        first.kill()
        sender.closed = True
        with pytest.raises(KVLost, match="or has ended"):
            reader.fetch(chunk)
        again = world.open("p0")
        reader.meet(again)
        assert reader.fetch(again.put(block(3))) == [block(3)]
    finally:
        for process in (receiver, second):
            process.close()
            process.stop()


@pytest.mark.parametrize("digest", [True, False], ids=["digest", "no digest"])
@pytest.mark.parametrize("mib", [1, 4, 12, 48])
def test_bandwidth(tmp_path, processes, mib, digest):
    size = (mib << 20) // CHUNK_BLOCKS
    world = ProcessWorld(tmp_path, processes)
    sender, receiver = world.pair(slots=CHUNK_BLOCKS, block_bytes=size, digest=digest)
    chunk = sender.put(*(numpy.random.default_rng(number).bytes(size) for number in range(CHUNK_BLOCKS)))
    assert receiver.fetch(chunk) == list(chunk.blocks), "equal before anything is timed"
    wanted = Wanted(("d", 0), "p0", PATH, chunk.handle, chunk.digest)
    fetched = statistics.median(receiver.store.process.time_takes(wanted, 30))
    plain = statistics.median(receiver.store.process.time_copies(mib << 20, 30))
    gpus.report(
        f"two processes, {'one GPU' if sender.store.reach.device == receiver.store.reach.device else 'two GPUs'}",
        device=receiver.store.process.name(),
        chunk_mb=round((mib << 20) / 1e6, 1),
        digest=digest,
        take_ms=round(fetched * 1e3, 3),
        gbps=round((mib << 20) / fetched / 1e9, 2),
        copy_gbps=round((mib << 20) / plain / 1e9, 2),
        equal=True,
    )
    world.close()
