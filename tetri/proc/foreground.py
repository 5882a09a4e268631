"""A deployment in the foreground, for containers and systemd: this process stays, copies all logs to standard output,
reaps children, stops the deployment on a signal and ends with it."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from tetri.config import Config
from tetri.proc import launch
from tetri.proc.follow import POLL_S, Follower, LogFile
from tetri.proc.supervise import LaunchError, Supervisor, commands

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
READER_S = 2.0  # patience with the reader of stdout or stderr


def run(config: Config, report: launch.Report, wait_s: float, summary: Callable[[Path], Iterable[str]]) -> None:
    """Start the deployment, report the lines of `summary`, and return when it was stopped: by SIGTERM, SIGINT, SIGHUP
    or `tetri-cli down`. Raises as `launch.up`, and LaunchError when supervisord fails; everything is stopped then."""
    _adopt_orphans()
    report = _patient(report)
    pid, status, followers = 0, 0, list[Follower]()

    def started(supervisor: Supervisor) -> None:
        nonlocal pid
        pid = _pid_of(supervisor)
        names = ["supervisord", *commands(config, supervisor.run_dir / launch.CONF)]
        logs = {name: LogFile(supervisor.log(name), supervisor.begin(name)) for name in names}
        folder = supervisor.run_dir / "log"
        followers.append(Follower(logs, sys.stdout.fileno(), lambda text: report(f"{text}; they are in {folder}")))

    with launch.noted_signals() as check:
        try:
            run_dir = launch.start(config, report, wait_s, check, started)
            for line in summary(run_dir):
                report(line)
            notify("READY=1", report)
            status = _until_stopped(pid, check, report)
        except KeyboardInterrupt:  # a signal during the start: `start` has stopped everything
            pass
        finally:
            notify("STOPPING=1", report)
            if pid:
                launch.clean_up(config.run_dir, pid, report)
            for follower in followers:
                follower.close(READER_S)
    if status:
        code = os.waitstatus_to_exitcode(status)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        raise LaunchError(f"supervisord {how}: everything was stopped")


def notify(state: str, report: launch.Report) -> None:
    """Send a state to systemd, if it waits for one (sd_notify(3))."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        name = f"\0{address[1:]}" if address.startswith("@") else address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.sendto(state.encode(), name)
        except OSError as error:
            report(f"warning: {state} cannot be sent to {address} ($NOTIFY_SOCKET): {error.strerror or error}")


def _adopt_orphans() -> None:
    """Become the parent of all descendants whose own parent ends, as PID 1 is: supervisord daemonizes."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise LaunchError(f"--foreground needs PR_SET_CHILD_SUBREAPER: {os.strerror(ctypes.get_errno())}")


def _pid_of(supervisor: Supervisor) -> int:
    pid = supervisor.pid() or next(iter(supervisor.chiefs()), None)
    if pid is None:
        raise LaunchError(f"supervisord has ended at once; its log is {supervisor.log('supervisord')}")
    return pid


def _until_stopped(pid: int, check: Callable[[], None], report: launch.Report) -> int:
    """Reap every child until supervisord, process `pid`, has ended; returns its wait status. A signal returns 0."""
    try:
        while True:
            check()
            child, status = os.waitpid(-1, os.WNOHANG)
            if child == pid:
                report("supervisord has ended")
                return status
            if child == 0:
                time.sleep(POLL_S)  # instead of a blocking wait, which a signal just before it would not end
    except KeyboardInterrupt:
        report("stopping")
        return 0


def _patient(report: launch.Report) -> launch.Report:
    """`report` that does not wait for a slow reader of stderr: a stop must go on."""

    def guarded(text: str) -> None:
        if select.select([], [sys.stderr], [], READER_S)[1]:
            report(text)

    return guarded
