"""When a worker has nixl's path, and what the library does to its process."""

import os
import subprocess
import sys
from itertools import product
from types import SimpleNamespace

import pytest

from tetri.kv import StoreSettings, enabled, open_store
from tetri.kv.base import KVError
from tetri.kv.nixl import agent as nixl_agent


def settings(**changed):
    return StoreSettings("t", "p0", 8, 100, **changed)


def test_without_the_package_it_is_one_line_that_names_the_extra(monkeypatch):
    monkeypatch.setattr(nixl_agent, "find_spec", lambda name: None)
    with pytest.raises(KVError, match=r"pip install 'tetri\[nixl\]'") as caught:
        open_store(settings(transport="nixl"))
    assert "\n" not in str(caught.value)
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("tetri-t-p0-")]


@pytest.mark.parametrize(("address", "installed", "rdma"), [*product(("", "tcp://a:1"), (False, True), (False, True))])
def test_auto_has_it_where_it_is_worth_its_while(monkeypatch, address, installed, rdma):
    monkeypatch.setattr(nixl_agent, "installed", lambda: installed)
    monkeypatch.setattr(nixl_agent, "has_rdma", lambda: rdma)
    assert ("nixl" in enabled(settings(address=address))) == bool(address and installed and rdma)
    assert enabled(settings(address=address, transport="nixl")) == ["nixl"]


def test_the_library_leaves_the_process_as_it_was_and_listens_on_the_loopback_device_only():
    """It would import torch, greet on standard output and silence the errors of every logger. Over TCP whoever can
    connect can read: without an address that is nobody outside."""
    code = """if True:
        import logging, os, sys
        from tetri.kv.nixl.agent import Agent
        agent = Agent("a", everywhere=False)
        assert "torch" not in sys.modules and logging.raiseExceptions
        own = {os.readlink(f"/proc/self/fd/{fd}") for fd in range(256) if os.path.lexists(f"/proc/self/fd/{fd}")}
        with open("/proc/self/net/tcp") as lines:
            for place, state, inode in (map(line.split().__getitem__, (1, 3, 9)) for line in list(lines)[1:]):
                if state == "0A" and f"socket:[{inode}]" in own:
                    print(place.split(":")[0])
        agent.close()
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("UCX_")}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0100007F\n", "")


@pytest.mark.parametrize(("address", "devices"), [("", "lo"), ("tcp://127.0.0.1:*", None)])
def test_only_with_an_address_it_listens_on_all_devices(monkeypatch, address, devices):
    seen = []

    class BackendError(Exception):
        """What the false bindings below raise."""

    def backend(*what):
        seen.append(os.environ.get("UCX_NET_DEVICES"))
        raise BackendError

    bindings = SimpleNamespace(nixlAgentConfig=SimpleNamespace, NIXL_THREAD_SYNC_NONE=0, BackendError=BackendError)
    bindings.nixlAgent = lambda name, config: SimpleNamespace(createBackend=backend)
    monkeypatch.setattr(nixl_agent, "library", lambda: bindings)
    monkeypatch.delenv("UCX_NET_DEVICES", raising=False)
    with pytest.raises(KVError, match="cannot start its backend UCX"):
        open_store(settings(transport="nixl", address=address))
    assert seen == [devices]
