"""The stand-in for CuPy can fail: each of its checks fires on the misuse that it is there for."""

import numpy as np
import pytest

from tests.kv.cuda.stand_in import Misuse, StandIn

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

    def behind(self, other):
        """The other's memory, its event waited for."""
        pointer, event = self.open(other)
        self.run.streamWaitEvent(self.stream, event)
        return pointer


@pytest.fixture
def sides(tmp_path):
    return Side(tmp_path), Side(tmp_path)


def closed(here, there):
    pointer, event = here.open(there)
    here.run.streamWaitEvent(here.stream, event)
    array = here.array(pointer)
    here.run.ipcCloseMemHandle(pointer)
    return pointer, array


def freed(there):
    handle, array = there.run.ipcGetMemHandle(there.pointer), there.array(there.pointer)
    there.run.free(there.pointer)
    return handle, array


def opened_event(here, there):
    """One that was never recorded."""
    return here.run.ipcOpenEventHandle(there.run.ipcGetEventHandle(there.event))


def destroyed(here, there):
    _, event = here.open(there)
    there.run.eventDestroy(there.event)
    return event


MISUSE = {
    "its own memory": [lambda h, t: h.run.ipcOpenMemHandle(h.run.ipcGetMemHandle(h.pointer))],
    "its own event": [lambda h, t: h.run.ipcOpenEventHandle(h.run.ipcGetEventHandle(h.event))],
    "second time": [
        lambda h, t: (h.open(t), h.run.ipcOpenMemHandle(t.run.ipcGetMemHandle(t.pointer))),
        lambda h, t: (h.open(t), h.run.ipcOpenEventHandle(t.run.ipcGetEventHandle(t.event))),
    ],
    "after its handle was closed": [
        lambda h, t: h.copy(h.pointer, closed(h, t)[0]),
        lambda h, t: closed(h, t)[1][0],
        lambda h, t: h.array(closed(h, t)[0]),
    ],
    "not open": [lambda h, t: h.run.ipcCloseMemHandle(closed(h, t)[0])],
    "still has open": [lambda h, t: (h.open(t), t.run.free(t.pointer))],
    "was freed": [lambda h, t: freed(t)[1].__setitem__(0, 1), lambda h, t: (freed(t), t.copy(t.pointer, t.pointer))],
    "but was freed": [lambda h, t: h.run.ipcOpenMemHandle(freed(t)[0])],
    "freed before": [lambda h, t: (freed(t), t.run.free(t.pointer))],
    "before it was recorded": [
        lambda h, t: h.run.eventQuery(opened_event(h, t)),
        lambda h, t: h.run.streamWaitEvent(h.stream, opened_event(h, t)),
    ],
    "without waiting for an event": [lambda h, t: h.copy(h.pointer, h.open(t)[0])],
    "only read": [lambda h, t: h.copy(h.behind(t), h.pointer)],
    "hostAlloc": [lambda h, t: h.run.freeHost(64)],
    "has destroyed it": [lambda h, t: h.run.eventQuery(destroyed(h, t))],
    "destroyed": [lambda h, t: (destroyed(h, t), t.run.eventRecord(t.event, t.stream))],
    "Interprocess and DisableTiming": [
        lambda h, t, flags=flags: h.run.ipcGetEventHandle(h.run.eventCreateWithFlags(flags)) for flags in (0, 2, 4)
    ],
    "beginning": [lambda h, t: h.run.ipcGetMemHandle(h.pointer + 64), lambda h, t: h.run.ipcGetMemHandle(64)],
    "in no memory": [
        lambda h, t: h.copy(h.pointer, h.pointer + 1),
        lambda h, t: h.copy(h.pointer, h.pointer - 1, 2),
        lambda h, t: h.copy(h.pointer, 64, 1),
    ],
    "no stream": [lambda h, t: h.run.streamSynchronize(4711)],
}


@pytest.mark.parametrize(("says", "use"), [(says, use) for says, uses in MISUSE.items() for use in uses])
def test_misuse_is_seen(sides, says, use):
    with pytest.raises(Misuse, match=says):
        use(*sides)


def test_what_is_waited_for_is_so_until_the_stream_was(sides):
    here, there = sides
    pointer = here.behind(there)
    here.copy(here.pointer, pointer)
    here.run.streamSynchronize(here.stream)
    with pytest.raises(Misuse, match="without waiting for an event"):
        here.copy(here.pointer, pointer)
    here.run.ipcCloseMemHandle(pointer)
    assert here.run.ipcOpenMemHandle(there.run.ipcGetMemHandle(there.pointer)), "it may be opened again"


def test_a_copy_is_not_done_before_the_stream_is_waited_for(sides):
    here, _ = sides
    pinned = here.run.hostAlloc(SIZE, 0)
    with pytest.raises(TypeError):
        here.array(here.pointer)[:] = b"x" * SIZE  # host memory
    here.array(here.pointer)[:] = np.full(SIZE, 9, np.uint8)
    here.copy(pinned, here.pointer)
    assert not (here.run.pinned[pinned] == 9).any()
    here.run.streamSynchronize(here.stream)
    assert (here.run.pinned[pinned] == 9).all()
    here.run.freeHost(pinned)


def test_a_stream_that_waits_for_an_event_that_never_comes_hangs(sides, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.kv.cuda.stand_in.PATIENCE_S", 0.05)
    here, there = sides[0], Side(tmp_path, lag_s=1e9)
    _, event = here.open(there)
    assert here.run.eventQuery(event) == 600
    with pytest.raises(Misuse, match="hangs for ever"):
        here.run.streamWaitEvent(here.stream, event)
