"""Copies the lines of log files to one descriptor as they are written, each after the name of its program."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

POLL_S = 0.2
PIECE = 1 << 16  # bytes of one read, and of the longest line that is copied whole
LEFT_OUT = b"(lines left out here: they were rotated away before they could be copied)"


class LogFile:
    """The lines of a log file, from the byte `begin` on. It is rotated: PATH becomes PATH.1, and a new PATH is made."""

    def __init__(self, path: Path, begin: int = 0) -> None:
        self.path = path
        self._file = _opened(path)
        if self._file is not None:
            self._file.seek(begin)
        self._rest = b""  # of a line that has no end yet

    def lines(self) -> Iterator[list[bytes]]:
        """Yield what was written since the last call, in lists of whole lines. Raises OSError."""
        while True:
            self._file = self._file or _opened(self.path)
            if self._file is None:
                return
            # Looked for before the read: once there is a newer file, nothing is appended to this one.
            newer = None if _same(self._file, self.path) else _opened(self.path)
            while piece := self._file.read(PIECE):
                *whole, self._rest = (self._rest + piece).split(b"\n")
                if len(self._rest) > PIECE:
                    whole += self.end()
                yield whole
            if newer is None:
                return
            if (before := Path(f"{self.path}.1")).exists() and not _same(self._file, before):
                yield [*self.end(), LEFT_OUT]
            self._file.close()
            self._file = newer

    def end(self) -> list[bytes]:
        """The line without an end that was written last, if there is one."""
        rest, self._rest = self._rest, b""
        return [rest] if rest else []

    def close(self) -> None:
        """Close the file. A second call does nothing."""
        if self._file is not None:
            self._file.close()


class Follower:
    """Follows the log files of programs in a thread of its own, since who reads the copy may be slow. When it cannot be
    written any more, `problem` gets one line."""

    def __init__(self, logs: Mapping[str, LogFile], descriptor: int, problem: Callable[[str], None]) -> None:
        width = max(map(len, logs), default=0)
        self._logs = [(f"{name:<{width}} | ".encode(), log) for name, log in logs.items()]
        self._descriptor, self._problem = descriptor, problem
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="logs", daemon=True)
        self._thread.start()

    def close(self, limit_s: float) -> None:
        """Copy what is left and end, or give up after `limit_s` seconds."""
        self._stop.set()
        self._thread.join(limit_s)
        if self._thread.is_alive():
            self._problem("the last lines of the logs were not copied: their reader is too slow")

    def _run(self) -> None:
        try:
            last = False
            while not last:
                last = self._stop.wait(POLL_S)
                for prefix, log in self._logs:
                    for lines in log.lines():
                        self._write(prefix, lines)
                    self._write(prefix, log.end() if last else [])
        except OSError as error:
            self._problem(f"the logs are no longer copied to standard output ({error.strerror})")
        finally:
            for _, log in self._logs:
                log.close()

    def _write(self, prefix: bytes, lines: list[bytes]) -> None:
        text = b"".join(prefix + line + b"\n" for line in lines)
        while text:
            text = text[os.write(self._descriptor, text) :]


def _opened(path: Path) -> BinaryIO | None:
    try:
        return open(path, "rb")
    except FileNotFoundError:
        return None  # not yet made, or just being rotated


def _same(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
