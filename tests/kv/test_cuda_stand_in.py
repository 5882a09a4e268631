"""The stand-in for CuPy can fail: each of its checks fires on the misuse that it is there for."""

import numpy as np
import pytest

from tests.kv.cuda_stand_in import HANDLE, CUDARuntimeError, Misuse, StandIn

SIZE = 4096
INTERPROCESS = 6


class Side:
    """One process's CUDA, with memory and an event of its own."""

    def __init__(self, folder, **options):
        self.cupy = StandIn(folder, **options)
        self.run = self.cupy.runtime
        self.stream = self.run.streamCreateWithFlags(1)
        self.pointer, self.event = self.run.malloc(SIZE), self.run.eventCreateWithFlags(INTERPROCESS)

    def array(self, pointer, size=SIZE):
        return self.cupy.ndarray((size,), "uint8", self.cupy.cuda.MemoryPointer((pointer, size), 0))

    def copy(self, into, source, size=SIZE):
        self.run.memcpyAsync(into, source, size, 4, self.stream)

    def open(self, other):
        """The other's memory, and its event, recorded."""
        pointer = self.run.ipcOpenMemHandle(other.run.ipcGetMemHandle(other.pointer))
        event = self.run.ipcOpenEventHandle(other.run.ipcGetEventHandle(other.event))
        other.run.eventRecord(other.event, other.stream)
        return pointer, event


@pytest.fixture
def sides(tmp_path):
    return Side(tmp_path), Side(tmp_path)


def test_what_is_right_works(sides):
    here, there = sides
    there.array(there.pointer)[:] = 7
    pointer, event = here.open(there)
    assert here.run.eventQuery(event) == 0
    here.run.streamWaitEvent(here.stream, event)
    here.copy(here.pointer, pointer)
    here.run.streamSynchronize(here.stream)
    assert (here.array(here.pointer).get() == 7).all()
    here.run.ipcCloseMemHandle(pointer)
    here.run.eventDestroy(event)
    there.run.free(there.pointer)
    there.run.eventDestroy(there.event)


def test_own_handles_are_not_opened(sides):
    here, _ = sides
    with pytest.raises(Misuse, match="its own memory"):
        here.run.ipcOpenMemHandle(here.run.ipcGetMemHandle(here.pointer))
    with pytest.raises(Misuse, match="its own event"):
        here.run.ipcOpenEventHandle(here.run.ipcGetEventHandle(here.event))


def test_nothing_is_opened_twice(sides):
    here, there = sides
    here.open(there)
    with pytest.raises(Misuse, match="second time"):
        here.run.ipcOpenMemHandle(there.run.ipcGetMemHandle(there.pointer))
    with pytest.raises(Misuse, match="second time"):
        here.run.ipcOpenEventHandle(there.run.ipcGetEventHandle(there.event))


def test_what_is_closed_is_not_used_and_not_closed_again(sides):
    here, there = sides
    pointer, event = here.open(there)
    here.run.streamWaitEvent(here.stream, event)
    array = here.array(pointer)
    here.run.ipcCloseMemHandle(pointer)
    for use in (
        lambda: here.copy(here.pointer, pointer),
        lambda: array[0],
        lambda: here.array(pointer),
    ):
        with pytest.raises(Misuse, match="after its handle was closed"):
            use()
    with pytest.raises(Misuse, match="not open"):
        here.run.ipcCloseMemHandle(pointer)
    again = here.run.ipcOpenMemHandle(there.run.ipcGetMemHandle(there.pointer))
    assert again


def test_memory_that_is_open_elsewhere_is_not_freed(sides):
    here, there = sides
    pointer, _ = here.open(there)
    with pytest.raises(Misuse, match="still has open"):
        there.run.free(there.pointer)
    here.run.ipcCloseMemHandle(pointer)
    there.run.free(there.pointer)


def test_a_freed_slab_is_not_used(sides):
    here, there = sides
    handle, array = there.run.ipcGetMemHandle(there.pointer), there.array(there.pointer)
    there.run.free(there.pointer)
    with pytest.raises(Misuse, match="was freed"):
        array[:] = 1
    with pytest.raises(Misuse, match="was freed"):
        there.copy(there.pointer, there.pointer)
    with pytest.raises(Misuse, match="but was freed"):
        here.run.ipcOpenMemHandle(handle)
    with pytest.raises(Misuse, match="freed before"):
        there.run.free(there.pointer)


def test_an_event_is_not_waited_for_before_it_was_recorded(sides):
    here, there = sides
    event = here.run.ipcOpenEventHandle(there.run.ipcGetEventHandle(there.event))
    for use in (lambda: here.run.eventQuery(event), lambda: here.run.streamWaitEvent(here.stream, event)):
        with pytest.raises(Misuse, match="before it was recorded"):
            use()


def test_a_peers_memory_is_read_only_behind_its_event_and_only_read(sides):
    here, there = sides
    pointer, event = here.open(there)
    with pytest.raises(Misuse, match="without waiting for an event"):
        here.copy(here.pointer, pointer)
    here.run.streamWaitEvent(here.stream, event)
    with pytest.raises(Misuse, match="only read"):
        here.copy(pointer, here.pointer)
    here.copy(here.pointer, pointer)
    here.run.streamSynchronize(here.stream)
    with pytest.raises(Misuse, match="without waiting for an event"):
        here.copy(here.pointer, pointer)


def test_a_copy_is_not_done_before_the_stream_is_waited_for(sides):
    here, _ = sides
    pinned = here.run.hostAlloc(SIZE, 0)
    here.array(here.pointer)[:] = 9
    here.copy(pinned, here.pointer)
    assert not (here.run.pinned[pinned] == 9).any()
    here.run.streamSynchronize(here.stream)
    assert (here.run.pinned[pinned] == 9).all()
    here.run.freeHost(pinned)
    with pytest.raises(Misuse, match="hostAlloc"):
        here.run.freeHost(pinned)


def test_a_destroyed_event_is_not_used(sides):
    here, there = sides
    _, event = here.open(there)
    there.run.eventDestroy(there.event)
    with pytest.raises(Misuse, match="has destroyed it"):
        here.run.eventQuery(event)
    with pytest.raises(Misuse, match="destroyed"):
        there.run.eventRecord(there.event, there.stream)


def test_a_stream_that_waits_for_an_event_that_never_comes_hangs(sides, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.kv.cuda_stand_in.PATIENCE_S", 0.05)
    here, there = sides[0], Side(tmp_path, lag_s=1e9)
    _, event = here.open(there)
    assert here.run.eventQuery(event) == 600
    with pytest.raises(Misuse, match="hangs for ever"):
        here.run.streamWaitEvent(here.stream, event)


def test_only_an_event_for_that_has_a_handle(sides):
    here, _ = sides
    for flags in (0, 2, 4):
        with pytest.raises(Misuse, match="Interprocess and DisableTiming"):
            here.run.ipcGetEventHandle(here.run.eventCreateWithFlags(flags))


def test_only_the_beginning_of_an_allocation_has_a_handle(sides):
    here, _ = sides
    for pointer in (here.pointer + 64, 64):
        with pytest.raises(Misuse, match="beginning"):
            here.run.ipcGetMemHandle(pointer)


def test_bytes_outside_any_memory_are_not_copied(sides):
    here, _ = sides
    for pointer, size in ((here.pointer + 1, SIZE), (here.pointer - 1, 2), (64, 1)):
        with pytest.raises(Misuse, match="in no memory"):
            here.copy(here.pointer, pointer, size)


def test_device_arrays_take_no_host_memory_and_streams_must_exist(sides):
    here, _ = sides
    with pytest.raises(TypeError):
        here.array(here.pointer)[:] = b"x" * SIZE
    here.array(here.pointer)[:] = np.ones(SIZE, np.uint8)
    with pytest.raises(Misuse, match="no stream"):
        here.run.streamSynchronize(4711)


def test_gpus_without_peer_access_and_false_handles_are_cudas_own_errors(sides, tmp_path):
    here, far = sides[0], Side(tmp_path, devices=2)
    far.run.setDevice(1)
    pointer = far.run.malloc(SIZE)
    with pytest.raises(CUDARuntimeError):
        here.run.ipcOpenMemHandle(far.run.ipcGetMemHandle(pointer))
    for open_handle in (here.run.ipcOpenMemHandle, here.run.ipcOpenEventHandle):
        for handle in (b"", bytes(HANDLE), b"memory-9.9-9".ljust(HANDLE, b"\0")[:10], b"memory-/".ljust(HANDLE, b"\0")):
            with pytest.raises(CUDARuntimeError):
                open_handle(handle)
    with pytest.raises(CUDARuntimeError):
        here.run.malloc(1 << 40)
    with pytest.raises(CUDARuntimeError):
        here.run.setDevice(1)
