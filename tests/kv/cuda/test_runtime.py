"""The seam to CuPy."""

import os
import subprocess
import sys

import pytest

from tests.kv.cuda.stand_in import StandIn
from tetri.kv.base import KVError
from tetri.kv.cuda.runtime import Buffer, Device, load, put_first


@pytest.fixture
def device(tmp_path):
    return Device(StandIn(tmp_path))


def test_the_workers_gpu_becomes_number_0_and_the_others_stay(monkeypatch):
    named = [("3,5,7", 1, [5, 3, 7]), ("GPU-aa,GPU-bb", 1, ["GPU-bb", "GPU-aa"])]
    for visible, gpu, then in [(None, 0, range(64)), (None, 2, [2, 0, 1, *range(3, 64)]), *named]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        put_first(gpu)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ",".join(map(str, then))


def test_gpus_know_who_is_near_and_one_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    devices = [Device(StandIn(tmp_path, devices=3, peers=[(0, 2)]), index) for index in range(3)]
    assert [device.near for device in devices] == [[devices[2].uuid], [], [devices[0].uuid]]
    assert len({device.uuid for device in devices}) == 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(KVError, match="there is no GPU 1"):
        put_first(1)
    with pytest.raises(KVError, match="GPU 1 cannot be used: cudaError"):
        Device(StandIn(tmp_path), 1)


@pytest.mark.parametrize(
    ("fake", "says"),
    [
        ("raise ImportError('no such library')", "needs CuPy (no such library): pip install"),
        ("import types; E = type('E', (RuntimeError,), {}); count = lambda: (_ for _ in ()).throw(E('no driver')); "
         "cuda = types.SimpleNamespace(runtime=types.SimpleNamespace(CUDARuntimeError=E, getDeviceCount=count))",
         "finds no GPU that it can use (no driver)"),
        ("import types; cuda = types.SimpleNamespace(runtime=types.SimpleNamespace("
         "CUDARuntimeError=RuntimeError, getDeviceCount=lambda: 0))", "CUDA_VISIBLE_DEVICES"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(tmp_path, monkeypatch, fake, says):
    (tmp_path / "cupy.py").write_text(fake)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    with pytest.raises(KVError) as caught:
        load()
    sys.modules.pop("cupy", None)  # the false one; a true one comes back by itself
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_cupy_is_not_imported_before_it_is_needed():
    code = "import sys, tetri.kv, tetri.kv.cuda.ipc, tetri.proc.build, tetri.proc.worker; print('cupy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_a_buffer_grows_and_gives_back_what_it_had(device):
    runtime = device.runtime
    for pinned in (True, False):
        buffer = Buffer(device, 100, "a test", pinned=pinned)
        first = buffer.pointer
        buffer.fit(50)
        assert buffer.pointer == first
        buffer.fit(200)
        assert len(buffer.view(0, 200)) == 200 and buffer.size == 200
        buffer.close()
        buffer.close()
    assert not runtime.pinned and all(shared.get().gone for shared, _ in runtime.memory.values())


def test_bytes_go_to_the_device_and_back_and_an_error_of_an_event_is_an_error(device):
    pinned, memory = (Buffer(device, 64, "a test", pinned=pinned) for pinned in (True, False))
    pinned.view(0, 64)[:] = bytes(range(64))
    device.copy(memory.pointer + 8, pinned.pointer, 16)
    device.copy(pinned.pointer + 32, memory.pointer + 8, 16)
    device.wait()
    assert bytes(pinned.view(32, 16)) == bytes(range(16))
    event = device.new_event()
    device.record(event)
    assert device.done(event)
    device.runtime.eventQuery = lambda event: 700
    with pytest.raises(RuntimeError, match="700"):
        device.done(event)
