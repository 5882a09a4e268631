"""A live cluster of real processes for tests: no supervisor, everything under one temporary run directory.

    with LiveCluster() as cluster:
        client = cluster.client()

On leaving, every process must end by SIGTERM, and no socket and no shared-memory segment may be left.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import starts
from forks import Program

from tetri.client import AsyncClient, Client, Operator, Result
from tetri.config import Config, load
from tetri.net import keys
from tetri.proc import gateways

REPOSITORY = Path(__file__).parent.parent
EMULATED = REPOSITORY / "conf" / "emulated.toml"
VLLM = REPOSITORY / "conf" / "split.toml"
AUTO = REPOSITORY / "conf" / "default.toml"
PATIENCE_S = 20.0  # of a test, for anything that should take far less


def wait_until(condition: Callable[[], bool], what: str, seconds: float = PATIENCE_S) -> float:
    """Poll until it holds; returns how long that took. The only way in which tests wait."""
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > seconds:
            raise AssertionError(f"after {seconds} s: {what}")
        time.sleep(0.005)
    return time.monotonic() - start


def free_port() -> int:
    """A TCP port that nobody uses."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


class LiveCluster:
    def __init__(
        self, conf: Path = EMULATED, overrides: Sequence[str] = (), start_s: float = PATIENCE_S, prologue: str = ""
    ) -> None:
        """`prologue`: statements that each program runs first, on one line."""
        self.prologue = prologue
        self.start_s = start_s
        # pytest's own folders may have paths too long for a Unix socket
        self.folder = folder = Path(tempfile.mkdtemp(prefix="tetri-", dir="/tmp"))
        self.name = f"t{os.getpid()}-{os.urandom(3).hex()}"
        keys.generate(str(folder / "kv.key"))
        own = [f"cluster.run_dir={folder}", f"cluster.name={self.name}", f"cluster.key={folder}/kv.key"]
        own.append("gateway.port=0")
        own += ["engine.cost=cpu-smollm2.toml"] if conf in (VLLM, AUTO) else []  # measuring takes too long
        self.overrides = [*own, *overrides]
        self.conf = conf
        self.config: Config = load(conf, self.overrides)
        self.processes: dict[str, subprocess.Popen[bytes] | Program] = {}
        self.clients: list[Client | Operator] = []
        self.killed: list[str] = []

    def __enter__(self) -> Self:
        try:
            self.start("broker")
            self.start("monitor")
            for worker in self.config.workers:
                self.start(worker.iid)
            self.wait_ready(*(worker.iid for worker in self.config.workers))
            # Where engines take a minute to start, the first takes both roles until the other has been there some time.
            roles = {worker.iid: worker.role for worker in self.config.workers}
            wait_until(lambda: self.roles() == roles, "other roles than configured", self.start_s)
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def start(self, name: str, *extra: str, inside: Sequence[str] = ()) -> None:
        """Start the broker, the monitor, a gateway, or the worker of this name, as its own program; `inside` comes
        before."""
        module = name if name in ("broker", "monitor") else "gateway" if name.startswith("gateway") else "worker"
        arguments = ["--conf", str(self.conf)]
        arguments += [part for override in self.overrides for part in ("--set", override)]
        arguments += ["--iid", name] if module == "worker" else []
        arguments += ["--number", name.removeprefix("gateway") or "0"] if module == "gateway" else []
        arguments += extra
        output, vllm = self.folder / f"{name}.log", self.config.engine.kind == "vllm"
        starts.engines += module == "worker" and vllm
        if not inside:
            self.processes[name] = Program(module, arguments, self.prologue, str(output), vllm)
            return
        program = f"{self.prologue}from tetri.proc.{module} import main; main()"
        command = [*inside, sys.executable, "-c", program, *arguments]
        with output.open("ab") as file:
            self.processes[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=file, stdout=file)

    def start_gateway(self, name: str = "gateway") -> str:
        """Start a gateway and return its URL."""
        self.start(name)

        def there() -> bool:
            self.assert_alive()
            return name in gateways.urls(self.folder)

        wait_until(there, "the gateway does not listen")
        return gateways.urls(self.folder)[name]

    def kill(self, name: str) -> None:
        """kill -9, and wait until the process is gone."""
        self.processes[name].send_signal(signal.SIGKILL)
        self.processes.pop(name).wait(10)
        self.killed.append(name)

    def client(self, **options: Any) -> Client:
        client = Client(self.config.clients_address, **options)
        self.clients.append(client)
        return client

    def operator(self, **options: Any) -> Operator:
        operator = Operator(self.config.operators_address, **options)
        self.clients.append(operator)
        return operator

    def answers(self, prompts: Sequence[Sequence[int]], **sampling: Any) -> list[Result]:
        """Of prompts that are all sent at once."""

        async def answer() -> list[Result]:
            async with AsyncClient(self.config.clients_address, timeout=300) as client:
                return await asyncio.gather(*(client.generate(prompt, **sampling) for prompt in prompts))

        return asyncio.run(answer())

    def instances(self) -> dict[str, dict[str, Any]]:
        with Client(self.config.clients_address) as client:
            return {instance["iid"]: instance for instance in client.status()["instances"]}

    def roles(self) -> dict[str, str]:
        return {iid: instance["role"] for iid, instance in self.instances().items()}

    def wait_ready(self, *iids: str) -> float:
        def ready() -> bool:
            self.assert_alive()
            known = self.instances()
            return all(iid in known and known[iid]["state"] == "ready" for iid in iids)

        return wait_until(ready, f"{iids} did not register", self.start_s)

    def wait_idle(self) -> None:
        """Until no row is open, no worker holds anything and every ledger is back at its capacity."""

        def idle() -> bool:
            with Client(self.config.clients_address) as client:
                status = client.status()
            lively = [i for i in status["instances"] if i["state"] == "ready"]
            blocks = all(i["load"]["free_blocks"] == i["blocks"] and not i["held"] for i in lively)
            return blocks and not status["requests"]

        wait_until(idle, "requests or blocks are left")

    def assert_alive(self) -> None:
        for name, process in self.processes.items():
            assert process.poll() is None, f"{name} ended: {self.log(name)[-2000:]}"

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def segments(self) -> list[str]:
        return [name for name in os.listdir("/dev/shm") if name.startswith(f"tetri-{self.name}-")]

    def kill_all(self) -> None:
        for name in list(self.processes):
            self.kill(name)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for client in self.clients:
            client.close()
        try:
            if kind is None:
                self.stop()
        finally:
            self.kill_all()
            from tetri.kv.shm import sweep

            sweep(self.name)
            shutil.rmtree(self.folder)

    def stop(self) -> None:
        """End all by SIGTERM and check that nothing is left but what a killed process could not take away."""
        self.assert_alive()
        for process in self.processes.values():
            process.send_signal(signal.SIGTERM)
        for name, process in self.processes.items():
            assert process.wait(30) == 0, f"{name}: {self.log(name)[-2000:]}"
            text = self.log(name)
            assert "Traceback" not in text, f"{name}: {text[-2000:]}"
        self.processes.clear()
        if not self.killed:
            assert self.segments() == []
            left = [p.name for p in self.folder.iterdir() if p.suffix not in (".log", ".lock", ".key")]
            assert left == (["record"] if self.config.cluster.record else [])
