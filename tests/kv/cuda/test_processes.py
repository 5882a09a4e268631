"""`cuda_ipc` between processes, each with a CUDA of its own that a stand-in plays: the contract, and processes that are
killed."""

import pytest

from tests.kv.contract import StoreContract
from tests.kv.cuda.process import Cuda, ProcessWorld, StoreProcess, killed_sender_is_lost_and_its_successor_is_read
from tests.kv.parties import block


@pytest.fixture(scope="module")
def cuda(tmp_path_factory):
    return Cuda(str(tmp_path_factory.mktemp("gpu")), {"devices": 2, "peers": [(0, 1)]})


@pytest.fixture(scope="module")
def processes(cuda):
    made = [StoreProcess(cuda, number % 2) for number in range(4)]
    yield made
    for process in made:
        process.stop()


class TestProcesses(StoreContract):
    """Two of the processes are on another GPU."""

    @pytest.fixture
    def world(self, tmp_path, processes):
        world = ProcessWorld(tmp_path, processes)
        yield world
        world.close()


def test_what_a_killed_sender_put_is_lost_and_its_successor_is_read(tmp_path, cuda):
    killed_sender_is_lost_and_its_successor_is_read(tmp_path, cuda)


def test_a_killed_reader_keeps_no_memory_open(tmp_path, cuda):
    """The sender's close gives the memory back at once; were it still open, the stand-in would raise."""
    processes = [StoreProcess(cuda, 0) for _ in range(2)]
    world = ProcessWorld(tmp_path, processes)
    sender, receiver = world.pair()
    assert receiver.fetch(sender.put(block(1))) == [block(1)]
    processes[1].kill()
    sender.give_back()
    sender.close()
    processes[0].stop()
