"""Controls the supervisord of one deployment: writes its configuration, starts, queries and stops it."""

from __future__ import annotations

import contextlib
import http.client
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tetri.config import Config

RPC_S = 5.0  # time limit of a call to supervisord, which may hang
STOP_S = 20  # from SIGTERM to SIGKILL: on a busy machine an engine needs long to end
_GONE = (OSError, http.client.HTTPException, xmlrpc.client.Error)  # supervisord does not answer, or is shutting down


class LaunchError(RuntimeError):
    """A deployment cannot be started or stopped. The first line of the message tells what to do."""


@dataclass(frozen=True, slots=True)
class Program:
    """One program under supervisord. `started`: time of its last start, in seconds since the epoch. `pid` is 0 when it
    does not run; then `exit_status` is the status of its last end."""

    name: str
    state: str
    pid: int
    started: int
    exit_status: int


@dataclass(frozen=True, slots=True)
class Supervisor:
    """The supervisord of the deployment in `run_dir`."""

    run_dir: Path

    @property
    def socket(self) -> Path:
        """Path of supervisord's RPC socket."""
        return self.run_dir / "supervisor.sock"

    def log(self, program: str) -> Path:
        """Path of a program's log."""
        return self.run_dir / "log" / f"{program}.log"

    def write(self, commands: dict[str, list[str]]) -> None:
        """Write the configuration, one program per command, and remove old logs. Raises LaunchError."""
        if any(char in str(self.run_dir) for char in ';#%\n"'):
            raise LaunchError(f"supervisord cannot read a run directory named {self.run_dir}: set another")
        self.log("x").parent.mkdir(exist_ok=True)
        for old in self.log("x").parent.glob("*.log*"):
            old.unlink()
        programs = [_program(name, command, self.log(name)) for name, command in commands.items()]
        user = ["user=root"] if os.getuid() == 0 else []  # without this line, supervisord warns
        text = _HEAD.format(run_dir=self.run_dir, user="\n".join(user))
        group = f"[group:tetri]\nprograms={','.join(commands)}\n"  # or a SIGTERM to it would end one after the other
        (self.run_dir / "supervisord.conf").write_text("\n".join([text, *programs, group]))

    def start(self) -> None:
        """Start supervisord; return when it runs in the background. Raises LaunchError."""
        command = [sys.executable, "-W", "ignore", "-m", "supervisor.supervisord", "-c", "supervisord.conf"]
        done = subprocess.run(
            command, cwd=self.run_dir, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            output = (done.stdout + done.stderr).strip().splitlines() or ["no output"]
            raise LaunchError(f"supervisord does not start: {output[0]}")

    def pid(self) -> int | None:
        """Pid of the supervisord; None when it does not answer."""
        try:
            with self._rpc() as rpc:
                return int(rpc.getPID())
        except _GONE:
            return None

    def programs(self) -> list[Program] | None:
        """State of all programs; None when supervisord does not answer."""
        try:
            with self._rpc() as rpc:
                found = rpc.getAllProcessInfo()
        except _GONE:
            return None
        return [Program(p["name"], p["statename"], p["pid"], p["start"], p["exitstatus"]) for p in found]

    def _running(self) -> set[int]:
        return {program.pid for program in self.programs() or ()} - {0}

    def stop(self) -> None:
        """End supervisord and all that it started, in whatever state they are. Raises LaunchError."""
        if self.pid() is not None:
            # supervisord notices that a program has ended when it is asked something, or once a second.
            with contextlib.suppress(*_GONE), self._rpc() as rpc:
                until = time.monotonic() + STOP_S + RPC_S
                while (pids := self._running()) and time.monotonic() < until:
                    if not pids.intersection(self.chiefs()):  # before its exec a program ignores signals as it does
                        rpc.stopAllProcesses(False)
                    time.sleep(0.02)
            with contextlib.suppress(*_GONE), self._rpc() as rpc:
                rpc.shutdown()
                _wait_gone(self.chiefs(), STOP_S)
        # Processes are left if supervisord hung, or died before them. End it first, or it restarts them.
        left = [*_end_all(self.chiefs), *_end_all(self.started)]
        if left:
            raise LaunchError(f"processes {', '.join(map(str, sorted(left)))} cannot be stopped: end them by hand")

    def alive(self) -> list[int]:
        """Pids of all living processes of this deployment, supervisord first."""
        return [*self.chiefs(), *self.started()]

    def chiefs(self) -> list[int]:
        """Pids of this run directory's supervisord, whether it answers or not. Reads /proc, because the pid file may be
        missing or outdated."""
        found = []
        for pid, arguments in _of_processes("cmdline"):
            if b"supervisor.supervisord" in arguments:
                with contextlib.suppress(OSError):  # it ended, or is another user's
                    if os.readlink(f"/proc/{pid}/cwd") == os.path.realpath(self.run_dir):
                        found.append(pid)
        return found

    def started(self) -> list[int]:
        """Pids of all living descendants of this run directory's supervisord."""
        mark = b"SUPERVISOR_SERVER_URL=unix://" + os.fsencode(self.socket)
        return [pid for pid, environment in _of_processes("environ") if mark in environment]

    @contextlib.contextmanager
    def _rpc(self, limit_s: float | None = None) -> Iterator[Any]:
        from supervisor.xmlrpc import SupervisorTransport

        transport = SupervisorTransport(None, None, serverurl=f"unix://{self.socket}")
        plain = transport._get_connection

        def with_limit() -> Any:  # supervisor's transport has no time limit
            connection = plain()
            connection.sock = _connected(self.socket, RPC_S if limit_s is None else limit_s)
            return connection

        transport._get_connection = with_limit
        try:
            yield xmlrpc.client.ServerProxy("http://127.0.0.1", transport=transport).supervisor
        finally:
            transport.close()


def commands(config: Config, conf: Path) -> dict[str, list[str]]:
    """The command line of the broker, the monitor and each worker, by program name. Raises LaunchError."""
    folder = Path(sys.executable).parent
    for name in ("tetri-broker", "tetri-monitor", "tetri-worker"):
        if not (folder / name).exists():
            raise LaunchError(f"{folder / name} is missing: run bin/setup")
    found = {name: [str(folder / f"tetri-{name}"), "--conf", str(conf)] for name in ("broker", "monitor")}
    for worker in config.workers:
        found[worker.iid] = [str(folder / "tetri-worker"), "--conf", str(conf), "--iid", worker.iid]
    return found


# startretries is high: a program that died in its first second is started again after 1, 2, 3, ... seconds.
_HEAD = """\
[supervisord]
pidfile={run_dir}/supervisord.pid
logfile={run_dir}/log/supervisord.log
logfile_maxbytes=1MB
logfile_backups=1
{user}

[unix_http_server]
file={run_dir}/supervisor.sock
chmod=0600

[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface
"""
_PROGRAM = """\
[program:{name}]
command={command}
autorestart=true
startsecs=1
startretries=1000
stopsignal=TERM
stopwaitsecs={stop_s}
redirect_stderr=true
stdout_logfile={log}
stdout_logfile_maxbytes=10MB
stdout_logfile_backups=1
"""


def _program(name: str, command: list[str], log: Path) -> str:
    line = shlex.join(command).replace("%", "%%")  # supervisord expands %(name)s
    return _PROGRAM.format(name=name, command=line, log=log, stop_s=STOP_S)


def _connected(path: Path, limit_s: float) -> socket.socket:
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        found.settimeout(limit_s)
        found.connect(str(path))
    except OSError:
        found.close()
        raise
    return found


def _of_processes(fact: str) -> Iterator[tuple[int, list[bytes]]]:
    """Yield (pid, parts) for every process; `fact` is "environ" or "cmdline"."""
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):  # it ended, or is another user's
                yield int(entry), Path("/proc", entry, fact).read_bytes().split(b"\0")


def _alive(pid: int) -> bool:
    try:
        state = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def _end_all(find: Callable[[], list[int]]) -> list[int]:
    """End the processes that `find` returns, until it returns none. Returns those that could not be ended."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        reported: set[int] = set()
        until = time.monotonic() + STOP_S
        # One that is just ending is not found any more, but holds its sockets for a moment.
        while (left := {*find(), *filter(_alive, reported)}) and time.monotonic() < until:
            for pid in left - reported:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            reported |= left
            time.sleep(0.02)
    return find()


def _wait_gone(pids: Sequence[int], limit_s: float) -> None:
    """Wait for these processes to end, at most `limit_s` seconds."""
    until = time.monotonic() + limit_s
    while any(map(_alive, pids)) and time.monotonic() < until:
        time.sleep(0.02)
