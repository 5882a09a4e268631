"""A worker's GPU: where the configuration says so, and what is made of it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.kv.cuda.stand_in import StandIn
from tetri.config import load
from tetri.kv.base import KVError
from tetri.proc import build
from tetri.proc.worker import joined

EMULATED = Path(__file__).parents[2] / "conf" / "emulated.toml"


@pytest.fixture
def played(tmp_path, monkeypatch):
    """A stand-in with two GPUs in place of CuPy. The card lies in /dev/shm."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(build, "load", lambda: StandIn(tmp_path, devices=2, peers=[(0, 1)]))


def test_the_command_line_has_the_last_word():
    config = load(EMULATED, ["worker.p0.gpu=1"])
    assert joined(config, "p0", None, None).worker("p0").gpu == 1
    assert joined(config, "p0", None, None, -1).worker("p0").gpu == -1
    assert joined(config, "x9", "decode", None, 0).worker("x9").gpu == 0


def test_workers_have_no_gpu_unless_told():
    assert build.gpu(load(EMULATED), "p0") is None


def test_the_store_is_on_the_gpu_that_was_named(played):
    config = load(EMULATED, ["worker.p0.gpu=1", "transfer.slab_blocks=40"])
    with ExitStack() as leaving:
        engine, store = build.engine_and_store(config, "p0", lambda seconds: False, lambda: None, leaving)
        assert store.reach.paths == ["cuda_ipc"]
        assert "0000:01:00.0" in store.reach.device and "0000:00:00.0" in store.reach.near[0]
        handle, _ = store.put(1, lambda views: views[0].__setitem__(slice(None), b"x" * engine.fingerprint.block_bytes))
        store.free(handle)


def test_a_transport_by_name_keeps_the_slab_on_the_host(played):
    config = load(EMULATED, ["worker.p0.gpu=0", "transfer.transport=shm", "transfer.slab_blocks=40"])
    with ExitStack() as leaving:
        _, store = build.engine_and_store(config, "p0", lambda seconds: False, lambda: None, leaving)
        assert (store.reach.paths, store.reach.device) == (["shm"], "")


@pytest.mark.parametrize(
    ("override", "says"),
    [("worker.p0.gpu=5", "there is no GPU 5"), ("transfer.transport=cuda_ipc", "gpu = 0")],
)
def test_what_cannot_be_is_one_line(played, override, says):
    with ExitStack() as leaving, pytest.raises(KVError, match=says):
        build.engine_and_store(load(EMULATED, [override]), "p0", lambda seconds: False, lambda: None, leaving)
