"""The environment in which vLLM starts, and what it says where it cannot. What it starts is in test_engine.py."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest

from tetri.engine.base import EngineError
from tetri.engine.vllm import setup


def test_the_environment_of_vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "GLOO_SOCKET_IFNAME": "eth9", "TETRI_CACHE": str(tmp_path)}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(setup.control_groups, "threads", lambda: 3)
    assert setup.prepare_environment() == 3
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["GLOO_SOCKET_IFNAME"] == "lo"  # whatever the host is called


def test_no_loopback_interface_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unreachable(self: socket.socket, address: object) -> None:
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr(setup.socket.socket, "connect", unreachable)
    settings = setup.VllmSettings(tmp_path, "float32", 64, 4, 1 << 30, None, "")
    with pytest.raises(EngineError, match=r"needs the loopback interface, .*is unreachable\): run ip link set lo up$"):
        setup.engine_config(settings)
