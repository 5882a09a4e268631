"""Two hosts on one machine: network namespaces joined by a veth pair, and a live cluster with its prefill worker in one
and its decode worker in the other, whose KV goes through a relay that delays, throttles and cuts.

Only the network is of two hosts: the control sockets (ipc) are files, which both see."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
from live import REPOSITORY, LiveCluster

from tetri.net import keys

PREFILL, DECODE = "10.77.0.1", "10.77.0.2"
SERVED, RELAYED = f"{PREFILL}:7001", f"{DECODE}:7000"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)


class TwoHosts:
    """`names` of the namespaces, by worker. Skips the test where they cannot be made."""

    def __init__(self) -> None:
        self.names = {"p0": f"tetri-{os.getpid()}-p", "d0": f"tetri-{os.getpid()}-d"}

    def __enter__(self) -> Self:
        if os.geteuid() != 0 or shutil.which("ip") is None:
            pytest.skip("network namespaces need root and iproute2")
        self._sweep()
        try:
            self._make()
        except subprocess.CalledProcessError as error:
            self.__exit__(None, None, None)
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    @staticmethod
    def _sweep() -> None:
        """What a test that was killed has left."""
        listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, timeout=20).stdout
        for name, pid in re.findall(r"^(tetri-(\d+)-[pd])\b", listed, flags=re.M):
            if not Path(f"/proc/{pid}").exists():
                subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=20)

    def _make(self) -> None:
        ends = {"p0": f"tp{os.getpid()}", "d0": f"td{os.getpid()}"}
        for name in self.names.values():
            ip("netns", "add", name)
        first, second = self.names["p0"], self.names["d0"]
        ip("-n", first, "link", "add", ends["p0"], "type", "veth", "peer", "name", ends["d0"], "netns", second)
        for iid, address in (("p0", PREFILL), ("d0", DECODE)):
            ip("-n", self.names[iid], "address", "add", f"{address}/24", "dev", ends[iid])
            ip("-n", self.names[iid], "link", "set", ends[iid], "up")
            ip("-n", self.names[iid], "link", "set", "lo", "up")

    def inside(self, iid: str) -> list[str]:
        """What to put before a command."""
        return ["ip", "netns", "exec", self.names[iid]]

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for name in self.names.values():  # the veth pair goes with them
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=20)


class TwoHostCluster(LiveCluster):
    """`weather`: what the relay is told."""

    def __init__(
        self, hosts: TwoHosts, conf: Path, overrides: Sequence[str], weather: Sequence[str], start_s: float
    ) -> None:
        self.hosts, self.weather = hosts, weather
        self.key_folder = Path(tempfile.mkdtemp(prefix="tetri-key-"))
        keys.generate(str(self.key_folder / "key"))
        settings = [f"cluster.key={self.key_folder / 'key'}", "transfer.transport=stream", *overrides]
        super().__init__(conf, settings, start_s)
        self.relay: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        try:
            self._start_relay()
            return super().__enter__()
        except BaseException:
            self._end()
            raise

    def _start_relay(self) -> None:
        relay = [sys.executable, str(REPOSITORY / "tests" / "relay.py"), RELAYED, SERVED, *self.weather]
        command = [*self.hosts.inside("d0"), *relay]
        self.relay = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
        assert self.relay.stdout is not None and json.loads(self.relay.stdout.readline()) == "ready"

    def start(self, name: str, *extra: str) -> None:
        addresses = {
            "p0": ["--set", f"transfer.address=tcp://{SERVED}", "--set", f"transfer.announce=tcp://{RELAYED}"],
            "d0": ["--set", f"transfer.address=tcp://{DECODE}:*"],
        }
        if name not in addresses:
            super().start(name, *extra)
        else:
            super().start(name, *addresses[name], *extra, inside=self.hosts.inside(name))

    def relayed(self) -> dict[str, Any]:
        """End the relay: what it counted."""
        assert self.relay is not None
        self.relay.terminate()
        said, _ = self.relay.communicate(timeout=20)
        return json.loads(said)

    def _end(self) -> None:
        if self.relay is not None:
            self.relay.kill()
            self.relay.communicate(timeout=20)
        shutil.rmtree(self.key_folder, ignore_errors=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            super().__exit__(kind, error, at)
        finally:
            self._end()
