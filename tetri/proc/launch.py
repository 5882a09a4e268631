"""Starts and stops a whole deployment on this machine.

up:    check, lock, write the files, start supervisord, wait until every worker is ready
down:  stop supervisord and what it started, remove sockets, state and dead shared memory
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import signal
import socket
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tetri import atomic, models, private
from tetri.client import Client, Unreachable
from tetri.config import CLUSTER_NAME, Config, dump, load
from tetri.kv.shm import sweep
from tetri.net import descriptors, keys
from tetri.net.address import refuse_live_owner
from tetri.net.errors import NetError
from tetri.net.lock import hold
from tetri.proc import cpus, gateways, memory, open_files, predictor, run_directory
from tetri.proc.supervise import LaunchError, Program, Supervisor, check_run_dir, commands, gateway_name
from tetri.strict import ConfigError

Report = Callable[[str], None]
CONF, STATE, KEY = run_directory.CONF, run_directory.STATE, run_directory.KEY
BUSY_S = 60.0  # patience with another `down`
LOG_LINES = 8  # log lines of a failing program that the error shows
CONFIG_EXIT = 2  # exit status of a program whose configuration is wrong: a restart does not help


class Busy(LaunchError):
    """Another process is starting or stopping the deployment."""


def up(config: Config, report: Report, wait_s: float) -> Path:
    """Start the deployment and return its run directory. Stops everything again when a program keeps dying, when the
    deployment is not ready after `wait_s` seconds, or on a signal. Raises LaunchError, ModelError and
    KeyboardInterrupt."""
    with noted_signals() as check:
        run_dir = start(config, report, wait_s, check)
    try:
        check()  # a signal after the last look in `start` must not be lost
    except KeyboardInterrupt:
        down(run_dir, report)
        raise
    return run_dir


def start(
    config: Config,
    report: Report,
    wait_s: float,
    check: Callable[[], None],
    started: Callable[[Supervisor], None] = lambda supervisor: None,
) -> Path:
    """As `up`, without its care for signals: `check` raises when to stop. `started` is called once supervisord runs."""
    config = _checked(config)
    run_dir = _private(config.run_dir)
    supervisor = Supervisor(run_dir)
    with _locked(run_dir):
        pid = supervisor.pid() or next(iter(supervisor.alive()), None)
        if pid is not None:
            raise LaunchError(f"already up (pid {pid}), run tetri-cli down first")
        _check_ports(config)
        _check_gateways(config)
        supervisor.try_socket()
        sweep(config.cluster.name)  # what a killed deployment left would count as memory in use
        for short in (*_shortages(config), *cpus.shortages(config)):
            report(f"warning: {short}")
        try:
            config = _with_key(config, run_dir / KEY)
            atomic.write_text(run_dir / CONF, dump(config))
            supervisor.write(commands(config, run_dir / CONF))
            supervisor.start()
            started(supervisor)
            report(f"started the broker, the monitor and {len(config.workers)} workers")
            _wait_ready(config, supervisor, report, time.monotonic() + wait_s, check)
            _write_state(config, supervisor)
            check()
        except BaseException:  # also a signal: half a deployment is useless
            try:
                report("stopping")
            finally:  # `report` fails when the terminal is gone
                _end(run_dir, report)
            raise
    return run_dir


def down(run_dir: Path, report: Report = lambda text: None) -> bool:
    """Stop the deployment; only logs and records stay. Returns whether anything ran. Raises LaunchError."""
    supervisor = Supervisor(run_dir)
    with _locked(_private(run_dir) if run_dir.exists() else run_dir):
        ran = supervisor.pid() is not None or bool(supervisor.alive())
        _end(run_dir, report)
    return ran


def clean_up(run_dir: Path, pid: int, report: Report) -> None:
    """As `down`, for the deployment of the supervisord that is or was process `pid`: wait while another process stops
    it, and leave alone what another process has started since. Raises LaunchError."""
    until = time.monotonic() + BUSY_S
    while True:
        try:
            with _locked(run_dir):
                if Supervisor(run_dir).pid() in (None, pid):
                    _end(run_dir, report)
                return
        except Busy:
            if time.monotonic() > until:
                raise
        time.sleep(0.05)


def _end(run_dir: Path, report: Report) -> None:
    Supervisor(run_dir).stop()
    name, clients = _written(run_dir / CONF)  # read after the stop: a damaged file must not prevent it
    if name:
        sweep(name)
    written = (run_dir / STATE, run_dir / KEY, run_dir / "supervisord.pid")
    for path in (*written, *gateways.reports(run_dir)):
        path.unlink(missing_ok=True)
    elsewhere = [Path(clients.removeprefix("ipc://"))] if clients.startswith("ipc://") else []
    inside = run_dir.iterdir() if run_dir.is_dir() else ()
    for path in {*inside, *elsewhere}:
        if path.is_socket():
            try:
                refuse_live_owner(str(path))
                path.unlink(missing_ok=True)
            except NetError:
                report(f"{path} is still in use: a program that was started by hand is still running")


def _written(conf: Path) -> tuple[str, str]:
    """(cluster name, clients' address) of the written configuration; "" for what cannot be read."""
    try:
        config = load(conf)
        return config.cluster.name, config.clients_address
    except ConfigError:
        pass  # written by another version, edited, or missing
    try:
        name = tomllib.loads(conf.read_text(encoding="utf-8"))["cluster"]["name"]
        return str(name) if re.fullmatch(CLUSTER_NAME, name) else "", ""
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "", ""


@contextlib.contextmanager
def noted_signals() -> Iterator[Callable[[], None]]:
    """Note SIGINT, SIGTERM and SIGHUP; yields a function that raises KeyboardInterrupt once one has arrived. So none of
    them, nor a second one, can interrupt a stop. One that is ignored already, as SIGHUP is under nohup, stays so."""
    received: list[int] = []
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():  # other threads cannot set handlers
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: received.append(number))

    def check() -> None:
        if received:
            raise KeyboardInterrupt

    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextlib.contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    if not run_dir.is_dir():  # it was removed, and perhaps cannot be made
        yield
        return
    try:
        lock = hold(run_dir / "up.lock")
    except NetError as error:
        raise Busy(f"another tetri-cli up or down is running: {error}") from None
    with lock:
        yield


def _checked(config: Config) -> Config:
    """Check the configuration before anything starts, and make the model's folder absolute. Raises ConfigError and
    ModelError."""
    check_run_dir(config)
    predictor.check(config)
    cpus.check(config)
    if config.engine.kind == "emulated":
        return config
    folder = models.find(config.model.name)
    if config.model.name in models.KNOWN:
        return config
    # The programs run in another working directory, where a relative path would be wrong.
    return dataclasses.replace(config, model=dataclasses.replace(config.model, name=str(folder)))


def _private(run_dir: Path) -> Path:
    """Make the run directory if needed; only its owner may use it. Raises LaunchError."""
    try:
        private.make_folder(run_dir)
    except private.PrivateError as error:
        raise LaunchError(str(error)) from None
    return run_dir


def _with_key(config: Config, own: Path) -> Config:
    """Name a key file: `own`, with a new key, if the configuration names no other. KV over TCP needs it. Raises
    LaunchError."""
    own.unlink(missing_ok=True)  # left by a deployment that was not stopped
    if config.cluster.key not in ("", str(own)):
        return config
    try:
        keys.generate(str(own))
    except NetError as error:
        raise LaunchError(str(error)) from None
    return dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, key=str(own)))


def _check_ports(config: Config) -> None:
    if config.clients_address.startswith("tcp://"):
        _try_port(config.clients_address, "choose another port with --set broker.clients=tcp://127.0.0.1:PORT")
    if port := config.broker.metrics_port:
        _try_port(f"tcp://127.0.0.1:{port}", "choose another with --set broker.metrics_port=PORT, or 0 for none")


def _try_port(address: str, advice: str) -> None:
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the broker's own sockets do
        try:
            probe.bind((host.strip("[]"), int(port)))
        except OSError as error:
            raise LaunchError(f"{address} cannot be used ({error.strerror}): {advice}") from None


def _check_gateways(config: Config) -> None:
    for number in range(config.gateway.count):
        try:
            gateways.listening(config, number).close()
        except NetError as error:
            raise LaunchError(str(error)) from None


def _shortages(config: Config) -> list[str]:
    """A line for each shortage: open files (connections wait), memory (the kernel may kill), /dev/shm (a worker refuses
    to start)."""
    limit = descriptors.hard_limit()
    names = ("broker", "monitor", "each worker", *["gateway"] * bool(config.gateway.count))
    files = [open_files.shortage(config, name, limit) for name in names]
    return [short for short in (*files, memory.shortage(config), memory.shm_shortage(config)) if short is not None]


def _wait_ready(
    config: Config, supervisor: Supervisor, report: Report, until: float, check: Callable[[], None]
) -> None:
    watch = _Watch(supervisor, memory.balance(config).text)
    waiting = {**{worker.iid: worker.role for worker in config.workers}, "monitor": "the loads of all"}
    waiting |= {gateway_name(number): "HTTP" for number in range(config.gateway.count)}
    with Client(config.clients_address, timeout=0.3, resend_s=0.1) as client:
        while waiting:
            check()
            watch.look()
            for iid in [*_ready(client), *gateways.urls(config.run_dir)]:
                if (role := waiting.pop(iid, None)) is not None:
                    report(f"{iid} ({role}) is ready")
            if waiting and time.monotonic() > until:
                raise LaunchError(f"not ready in time: {', '.join(waiting)}; logs are in {supervisor.run_dir}/log")
            time.sleep(0.05)


def _ready(client: Client) -> list[str]:
    """The workers that are ready, and "monitor" once the broker has received a cluster view."""
    try:
        status = client.status()
    except Unreachable:
        return []
    monitor = ["monitor"] if status.get("monitor") is not None else []
    return [found["iid"] for found in status["instances"] if found["state"] == "ready"] + monitor


class _Watch:
    """Detects a program that keeps dying. `memory_text`: the memory that was needed and available, for one that the
    kernel kills."""

    def __init__(self, supervisor: Supervisor, memory_text: str) -> None:
        self._supervisor, self._memory_text = supervisor, memory_text
        self._starts: dict[str, set[int]] = {}
        self._silent = 0

    def look(self) -> None:
        """Check once. Raises LaunchError when a program died twice, or once with CONFIG_EXIT."""
        programs = self._supervisor.programs()
        self._silent = self._silent + 1 if programs is None else 0
        if self._silent > 20:
            raise LaunchError(f"supervisord does not answer; its log is {self._supervisor.log('supervisord')}")
        for program in programs or []:
            starts = self._starts.setdefault(program.name, set())
            starts |= {program.started} - {0}
            deaths = len(starts) - (program.pid != 0)
            if deaths > 1 or (deaths == 1 and program.pid == 0 and program.exit_status == CONFIG_EXIT):
                self._give_up(program)

    def _give_up(self, program: Program) -> None:
        path = self._supervisor.log(program.name)
        output = [line for line in self._supervisor.output(program.name) if line.strip()][-LOG_LINES:]
        ended = self._supervisor.last_end(program.name)
        by_signal = re.match(r"terminated by (SIG\w+|signal \d+)", ended)
        if by_signal or not output:
            reason, before = self._death(by_signal[1]) if by_signal else f"{ended}, no output", output
        else:
            reason, before = output[-1], [line for line in output if line != output[-1]]
        raise LaunchError("\n    ".join([f"{program.name} does not start: {reason}", *before, f"log: {path}"]))

    def _death(self, name: str) -> str:
        number = f"signal {signal.Signals[name].value} ({name})" if name in signal.Signals.__members__ else name
        why = f", as the kernel does when memory runs out: {self._memory_text}" if name == "SIGKILL" else ""
        return f"killed by {number}{why}"


def _write_state(config: Config, supervisor: Supervisor) -> None:
    state = {
        "name": config.cluster.name,
        "clients": config.clients_address,
        "operators": config.operators_address,
        "config": str(supervisor.run_dir / CONF),
        "pids": {"supervisord": supervisor.pid(), **{each.name: each.pid for each in supervisor.programs() or []}},
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    atomic.write_text(supervisor.run_dir / STATE, json.dumps(state, indent=2) + "\n")
