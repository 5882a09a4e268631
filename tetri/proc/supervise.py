"""Controls the supervisord of one deployment: writes its configuration, starts, queries and stops it."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tetri.config import Config
from tetri.net.address import MAX_PATH_BYTES, NEXT, check
from tetri.net.errors import NetError

RPC_S = 5.0  # time limit of a call to supervisord, which may hang
START_S = 60.0  # limit for supervisord, which takes a second unless the machine is busy
STOP_S = 20  # from SIGTERM to SIGKILL: on a busy machine an engine needs long to end
SOCKET = "supervisor.sock"
OLD_LOGS = 16  # kept of programs that are not in the configuration any more
_NEW_RUN = "--- up"
_LAST_PID = 4194304  # the highest that Linux gives
_MODULE, _MARK = b"supervisor.supervisord", b"SUPERVISOR_SERVER_URL=unix://"
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
        return self.run_dir / SOCKET

    @property
    def conf(self) -> Path:
        """Path of supervisord's configuration."""
        return self.run_dir / "supervisord.conf"

    def log(self, program: str) -> Path:
        """Path of a program's log."""
        return self.run_dir / "log" / f"{program}.log"

    def write(self, commands: dict[str, list[str]]) -> None:
        """Write the configuration, one program per command, and begin a new run in the logs."""
        self._begin_logs(commands)
        programs = [_program(name, command, self.log(name)) for name, command in commands.items()]
        user = ["user=root"] if os.getuid() == 0 else []  # without this line, supervisord warns
        text = _HEAD.format(run_dir=self.run_dir, socket=SOCKET, user="\n".join(user))
        group = f"[group:tetri]\nprograms={','.join(commands)}\n"  # or a SIGTERM to it would end one after the other
        self.conf.write_text("\n".join([text, *programs, group]))

    def _begin_logs(self, programs: Collection[str]) -> None:
        """Mark in each log where the new run begins. Of programs that it does not have, keep the latest logs."""
        folder = self.log("x").parent
        folder.mkdir(exist_ok=True)
        logs = {self.log(name) for name in (*programs, "supervisord")}
        for path in logs:
            with path.open("a", encoding="utf-8") as log:
                log.write("\n" if log.tell() else "")  # the last line may have no end
                log.write(f"{_NEW_RUN} {datetime.now(UTC).isoformat(timespec='seconds')} ---\n")
        others = [path for path in folder.glob("*.log*") if path.with_name(path.name.removesuffix(".1")) not in logs]
        for old in sorted(others, key=lambda path: path.stat().st_mtime)[:-OLD_LOGS]:
            old.unlink()

    def output(self, program: str) -> list[str]:
        """The lines that a program has logged since the last `write`."""
        path = self.log(program)
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        begins = [number for number, line in enumerate(lines, 1) if line.startswith(_NEW_RUN)]
        return lines[begins[-1] if begins else 0 :]  # without the mark, all before this run is in a rotated file

    def begin(self, program: str) -> int:
        """Where the last `write` has marked the begin of a run in a program's log, in bytes."""
        path = self.log(program)
        return (path.read_bytes() if path.exists() else b"").rfind(b"\n" + _NEW_RUN.encode()) + 1

    def try_socket(self) -> None:
        """Raise LaunchError unless supervisord can make its socket in the run directory. It would try for ever."""
        probe, linked = (Path(f"{self.socket}.{name}") for name in (os.getpid(), "linked"))
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as made:
                made.bind(str(probe))
            os.link(probe, linked)
        except OSError as error:
            why = f"no Unix socket can be made and hard-linked in {self.run_dir} ({error.strerror})"
            raise LaunchError(f"{why}: set a cluster.run_dir in another file system") from None
        finally:
            for path in (probe, linked):
                path.unlink(missing_ok=True)

    def start(self) -> None:
        """Start supervisord; return when it runs in the background. Raises LaunchError."""
        command = [sys.executable, "-P", "-W", "ignore", "-m", "supervisor.supervisord", "-c", str(self.conf)]
        try:
            # Not in the run directory: if that is removed, programs could not start any more.
            done = subprocess.run(
                command, cwd="/", stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=START_S, check=False
            )
        except subprocess.TimeoutExpired as late:
            output = os.fsdecode(late.stderr or b"").strip().splitlines() or ["no output"]
            raise LaunchError(f"supervisord does not start within {START_S:g} s: {output[-1]}") from None
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

    def last_end(self, program: str) -> str:
        """How a program ended last, in supervisord's words: "exit status 1", "terminated by SIGKILL". Its RPC does not
        tell which signal, and no status of an end in the first second."""
        found = re.findall(rf" exited: {re.escape(program)} \((.*?)[;)]", "\n".join(self.output("supervisord")))
        return found[-1] if found else "it ended"

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
        """Pids of this run directory's supervisord, whether it answers or not. Reads /proc, because the run directory
        and all in it may be gone."""
        found = ((pid, arguments) for pid, arguments in _of_processes("cmdline") if _MODULE in arguments)
        return [pid for pid, arguments in found if any(_same(path, self.conf) for path in arguments)]

    def started(self) -> list[int]:
        """Pids of all living descendants of this run directory's supervisord."""
        return [pid for pid, environment in _of_processes("environ") if self._marks(environment)]

    def started_this(self) -> bool:
        """Whether this process is a descendant of this run directory's supervisord."""
        return self._marks([b"%s=%s" % entry for entry in os.environb.items()])

    def _marks(self, environment: Sequence[bytes]) -> bool:
        return any(_same(entry[len(_MARK) :], self.socket) for entry in environment if entry.startswith(_MARK))

    @contextlib.contextmanager
    def _rpc(self) -> Iterator[Any]:
        from supervisor.xmlrpc import SupervisorTransport

        transport = SupervisorTransport(None, None, serverurl=f"unix://{self.socket}")
        plain = transport._get_connection

        def with_limit() -> Any:  # supervisor's transport has no time limit
            connection = plain()
            connection.sock = _connected(self.socket)
            return connection

        transport._get_connection = with_limit
        try:
            yield xmlrpc.client.ServerProxy("http://127.0.0.1", transport=transport).supervisor
        finally:
            transport.close()


def check_run_dir(config: Config) -> None:
    """Raise LaunchError when supervisord cannot read the name of the run directory, or when a Unix socket in it would
    have too long a path."""
    run_dir = config.run_dir
    if any(char in str(run_dir) for char in ';#%\n"'):
        raise LaunchError(f"supervisord cannot read a run directory named {run_dir}: set another cluster.run_dir")
    own = (config.operators_address, config.events_address, config.loads_address, config.views_address)
    sockets = [*own, *(config.inbox_address(worker.iid) for worker in config.workers)]
    names = [address.rpartition("/")[2] + NEXT for address in sockets]
    names.append(f"{SOCKET}.{_LAST_PID}")  # supervisord binds this and then links it to its name
    allowed = MAX_PATH_BYTES - max(map(len, names)) - 1
    size = len(os.fsencode(run_dir))
    if size > allowed:
        raise LaunchError(f"cluster.run_dir: {run_dir} has {size} bytes, at most {allowed} fit: set a shorter one")
    try:
        check(config.clients_address)
    except NetError as error:
        raise LaunchError(f"broker.clients: {error}") from None


def commands(config: Config, conf: Path) -> dict[str, list[str]]:
    """The command line of the broker, the monitor, each gateway and each worker, by program name. Raises
    LaunchError."""
    folder = Path(sys.executable).parent
    for name in ("tetri-broker", "tetri-gateway", "tetri-monitor", "tetri-worker"):
        if not (folder / name).exists():
            raise LaunchError(f"{folder / name} is missing: run bin/setup")
    found = {name: [str(folder / f"tetri-{name}"), "--conf", str(conf)] for name in ("broker", "monitor")}
    for number in range(config.gateway.count):
        command = [str(folder / "tetri-gateway"), "--conf", str(conf), "--number", str(number)]
        found[gateway_name(number)] = command
    for worker in config.workers:
        found[worker.iid] = [str(folder / "tetri-worker"), "--conf", str(conf), "--iid", worker.iid]
    return found


def gateway_name(number: int) -> str:
    """The name of a gateway's process; the first is number 0."""
    return f"gateway{number or ''}"


# startretries is high: a program that died in its first second is started again after 1, 2, 3, ... seconds.
_HEAD = """\
[supervisord]
pidfile={run_dir}/supervisord.pid
logfile={run_dir}/log/supervisord.log
logfile_maxbytes=1MB
logfile_backups=1
{user}

[unix_http_server]
file={run_dir}/{socket}
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


def _connected(path: Path) -> socket.socket:
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        found.settimeout(RPC_S)
        found.connect(str(path))
    except OSError:
        found.close()
        raise
    return found


def _of_processes(fact: str) -> Iterator[tuple[int, list[bytes]]]:
    """Yield (pid, parts) for every process of this user; `fact` is "environ" or "cmdline"."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended
            if process.stat().st_uid == os.getuid():
                yield int(process.name), (process / fact).read_bytes().split(b"\0")


def _same(path: bytes, other: Path) -> bool:
    """Whether both name one file, which need not exist."""
    return path.startswith(b"/") and os.path.realpath(path) == os.fsencode(os.path.realpath(other))


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
