"""The run directory of a deployment: made for its user alone, and kept while the deployment runs.

Cleaners of temporary files remove old files from it, and a logout removes all of it. Every process of the deployment
holds a shared lock on the directory: systemd-tmpfiles then spares it and all in it. Once a second each process also
makes again what is gone: the directory, its files, the logs. net/turnstile.py does so for sockets, apart from that of
supervisord, without which `Supervisor` finds its processes in /proc.
"""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from logging import Logger
from pathlib import Path
from threading import Event, Thread

from tetri import atomic, private
from tetri.proc.supervise import Supervisor

CONF, STATE, KEY = "cluster.toml", "cluster.json", "kv.key"
KEPT = (CONF, STATE, KEY, "supervisord.conf")  # what restarted programs and clients read
CHECK_S = 1.0


@contextmanager
def kept(run_dir: Path, logger: Logger) -> Iterator[None]:
    """Make the run directory, for this user alone, and keep it until the end of the `with`. Raises PrivateError."""
    private.make_folder(run_dir)
    keeper, stop = Keeper(run_dir, logger), Event()
    keeper.look()

    def watch() -> None:
        while not stop.wait(CHECK_S):
            keeper.look()

    thread = Thread(target=watch, name="run directory", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        keeper.close()


class Keeper:
    """Holds the lock of a run directory and makes again what is gone. Only a program of supervisord writes files: one
    that was started by hand may outlive the deployment."""

    def __init__(self, run_dir: Path, logger: Logger) -> None:
        self._run_dir, self._log = run_dir, logger
        self._supervisor = Supervisor(run_dir)
        self._descriptor = -1
        self._files: dict[str, tuple[int, bytes]] = {}  # mode and content at the last look
        self._logs: set[Path] = set()
        self._problem = ""

    def look(self) -> None:
        """Make again what is gone since the last look. What fails is logged once and tried at every look."""
        try:
            private.keep_folder(self._run_dir)
            if self._supervisor.started_this():
                self._keep_logs()
                for name in KEPT:
                    self._keep(name)
            self._lock()
            self._problem = ""
        except (OSError, private.PrivateError) as error:
            if str(error) != self._problem:
                self._problem = str(error)
                self._log.warning("cannot keep the run directory: %s", error)

    def _keep(self, name: str) -> None:
        path = self._run_dir / name
        with suppress(FileNotFoundError):
            self._files[name] = private.read_file(path)
            return
        if name in self._files:
            mode, content = self._files[name]
            with atomic.file(path) as part:
                part.touch(mode)
                part.write_bytes(content)
            self._log.warning("%s was removed: written again", path)

    def _keep_logs(self) -> None:
        """Have supervisord open logs again: it goes on to write to removed files, and starts no program without the
        folder of its log."""
        folder = self._supervisor.log("x").parent
        logs = set(folder.glob("*.log"))
        if self._logs - logs:
            folder.mkdir(exist_ok=True)
            for pid in self._supervisor.chiefs():
                os.kill(pid, signal.SIGUSR2)
            self._log.warning("logs in %s were removed: opened again", folder)
        self._logs = logs

    def _lock(self) -> None:
        if self._descriptor >= 0 and os.path.samestat(os.fstat(self._descriptor), self._run_dir.stat()):
            return
        self.close()
        descriptor = os.open(self._run_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    def close(self) -> None:
        """Release the lock."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
