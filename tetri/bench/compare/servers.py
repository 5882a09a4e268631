"""Start the processes of an arrangement, and stop them again: vLLM's own servers, or a deployment of tetri."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tetri import models
from tetri.bench.compare.arrangements import Arrangement
from tetri.bench.deployment import LOAD_S, configured, running
from tetri.bench.report import BenchError, Progress
from tetri.config import Config
from tetri.proc import gateways
from tetri.proc.cpus import chosen

STOP_S = 20.0  # that a server may take to end
POLL_S = 0.2
HOST = "127.0.0.1"


def model_name(config: Config) -> str:
    """The name by which clients ask for the model."""
    return "emulated" if config.engine.kind == "emulated" else Path(config.model.name).name


@contextmanager
def serving(arrangement: Arrangement, config: Config, folder: Path, note: Progress) -> Iterator[list[str]]:
    """Start the arrangement, yield the URLs of its servers, and stop it. Raises BenchError, LaunchError, ModelError and
    ConfigError."""
    if arrangement.urls:
        yield [*arrangement.urls]
        return
    start = _tetri if arrangement.is_tetri else _vllm
    with start(arrangement, config, folder, note) as urls:
        yield urls


# ---------------------------------------------------------------- tetri


def tetri_config(arrangement: Arrangement, conf: Path, folder: Path, settings: Sequence[str]) -> Config:
    """The configuration `conf` with `settings` and the roles of the arrangement. Raises ConfigError."""
    workers = configured(conf, folder, "bench", settings).workers
    roles = [f"worker.{worker.iid}.role={role}" for worker, role in zip(workers, arrangement.roles, strict=False)]
    return configured(conf, folder, "bench", [*settings, "gateway.count=1", "gateway.port=0", *roles])


@contextmanager
def _tetri(arrangement: Arrangement, config: Config, folder: Path, note: Progress) -> Iterator[list[str]]:
    def warn(text: str) -> None:
        if text.startswith("warning"):
            note(text)

    with running(config, warn, LOAD_S) as run_dir:
        yield [*gateways.urls(run_dir).values()]


# ---------------------------------------------------------------- vLLM


def shares(config: Config, servers: int) -> list[list[int]]:
    """The numbers of the workers that each server stands for."""
    size = len(config.workers) // servers
    return [[*range(first, first + size)] for first in range(0, size * servers, size)]


def cpus_of(config: Config, workers: Sequence[int]) -> list[int]:
    """The CPUs of these workers. Raises ConfigError."""
    found = [chosen(config.workers[number].cpus, f"worker {config.workers[number].iid}.cpus") for number in workers]
    return sorted(set().union(*found))


def command_of(arrangement: Arrangement, config: Config, workers: Sequence[int], port: int) -> list[str]:
    """The command line of a vLLM server that stands for these workers: the same model, memory for KV and context as
    theirs, else vLLM's defaults. Raises ModelError."""
    options: dict[str, object] = {
        "--served-model-name": model_name(config),
        "--host": HOST,
        "--port": port,
        "--dtype": config.model.dtype,
        "--kv-cache-memory-bytes": len(workers) * config.engine.kv_mib << 20,
        "--generation-config": "vllm",
        "--uvicorn-log-level": "warning",
    }
    if config.model.context:
        options["--max-model-len"] = config.model.context
    if arrangement.chunk:
        options["--max-num-batched-tokens"] = arrangement.chunk
    if len(workers) > 1 and config.workers[workers[0]].gpu >= 0:
        options["--tensor-parallel-size"] = len(workers)
    program = [sys.executable, "-P", "-m", "tetri.bench.vllm_command", "serve", str(models.find(config.model.name))]
    program += ["--enforce-eager"] * arrangement.eager
    return [*program, *(str(part) for option in options.items() for part in option)]


@contextmanager
def _vllm(arrangement: Arrangement, config: Config, folder: Path, note: Progress) -> Iterator[list[str]]:
    with ExitStack() as stack:
        made = [
            stack.enter_context(_server(arrangement, config, workers, port, folder / f"vllm{number}.log"))
            for number, (workers, port) in enumerate(
                zip(shares(config, arrangement.servers), _free_ports(arrangement.servers), strict=True)
            )
        ]
        for server in made:
            server.wait_ready()
        yield [server.url for server in made]


class VllmServer:
    """A vLLM server that is starting. `url`: where it will listen."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], cpus: Sequence[int], log: Path) -> None:
        self.url = f"http://{HOST}:{command[command.index('--port') + 1]}"
        self._log, own = log, os.sched_getaffinity(0)
        os.sched_setaffinity(0, cpus)  # the child inherits it, and counts its CPUs by it
        try:
            with open(log, "ab") as output:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                    env={**os.environ, **environment}, start_new_session=True,
                )  # fmt: skip
        finally:
            os.sched_setaffinity(0, own)

    def wait_ready(self) -> None:
        """Wait until it answers. Raises BenchError."""
        until = time.monotonic() + LOAD_S
        while not _healthy(self.url):
            if self._process.poll() is not None:
                raise BenchError(f"the vLLM server ended with status {self._process.returncode}: {self._last_line()}")
            if time.monotonic() > until:
                raise BenchError(f"the vLLM server was not ready after {LOAD_S:g} s: {self._last_line()}")
            time.sleep(POLL_S)

    def stop(self) -> None:
        """End it with all of its processes. They get some time, in which they remove their shared memory."""
        self._process.terminate()
        until = time.monotonic() + STOP_S
        while self._some_run() and time.monotonic() < until:
            time.sleep(POLL_S)
        with suppress(ProcessLookupError):  # all have ended
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _some_run(self) -> bool:
        self._process.poll()  # else it would remain as a zombie
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, 0)
            return True
        return False

    def _last_line(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        errors = [line for line in lines if "Error" in line]
        return (errors or lines or ["its log is empty"])[-1].strip()


@contextmanager
def _server(
    arrangement: Arrangement, config: Config, workers: Sequence[int], port: int, log: Path
) -> Iterator[VllmServer]:
    cpus, gpus = cpus_of(config, workers), [config.workers[number].gpu for number in workers]
    environment = {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cpus))}
    if gpus[0] >= 0:
        environment = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))}
    server = VllmServer(command_of(arrangement, config, workers, port), environment, cpus, log)
    try:
        yield server
    finally:
        server.stop()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:  # all are held together, so that they differ
        listeners = [stack.enter_context(socket.create_server((HOST, 0))) for _ in range(count)]
        return [listener.getsockname()[1] for listener in listeners]


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False
