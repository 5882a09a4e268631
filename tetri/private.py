"""Folders that only this user may use. Another user may have made the folder first, or a link in its place, so the
owner, the mode and the files in it are checked on what was opened, not on the path."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

_PLAIN = os.O_NOFOLLOW | os.O_NONBLOCK  # a FIFO must not block
MOST_BYTES = 4 << 20  # of a file: every process of a deployment reads it each second
_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW


class PrivateError(RuntimeError):
    """A folder or a file may be another user's work. The message is one line and says what to do."""


def make_folder(path: Path) -> None:
    """Make the folder `path` if needed, and let only this user enter it. Raises PrivateError."""
    with _made(path) as folder:
        if _others(os.fstat(folder)):
            os.chmod(".", 0o700, dir_fd=folder)


def keep_folder(path: Path) -> None:
    """Make the folder `path` if it is gone. Raises PrivateError, also if it is another user's."""
    with _made(path):
        pass


def check_folder(path: Path) -> None:
    """Raise PrivateError unless only this user can enter the folder `path`, and OSError when there is none."""
    with _checked(path):
        pass


def read_text(path: Path) -> str:
    """The UTF-8 text of a file in a folder that only this user can enter. Raises PrivateError, UnicodeError and
    OSError."""
    with _checked(path.parent) as folder:
        return read_file(path, folder)[1].decode()


def read_file(path: Path, folder: int | None = None) -> tuple[int, bytes]:
    """The mode and the content of a plain file of this user, opened in `folder` if that is given. Never waits, as for a
    FIFO. Raises PrivateError and OSError."""
    with open(path, "rb", opener=partial(_open_in, folder)) as file:
        facts = os.fstat(file.fileno())
        if not own_file(facts):
            raise PrivateError(f"{path}: not a file of this user: remove it")
        if facts.st_size > MOST_BYTES:
            raise PrivateError(f"{path}: too large to be a file of tetri: remove it")
        return stat.S_IMODE(facts.st_mode), file.read()


def own_file(facts: os.stat_result) -> bool:
    """Whether the facts of an opened file are those of a plain file of this user."""
    return stat.S_ISREG(facts.st_mode) and facts.st_uid == os.geteuid()


def _open_in(folder: int | None, path: str, flags: int) -> int:
    return os.open(path if folder is None else os.path.basename(path), flags | _PLAIN, dir_fd=folder)


@contextmanager
def _made(path: Path) -> Iterator[int]:
    """A descriptor of this user's folder `path`, which is made if needed."""
    try:
        with suppress(FileExistsError):  # what exists is looked at below
            path.mkdir(mode=0o700, parents=True)
        with _own(path) as folder:
            yield folder
    except OSError as error:
        raise PrivateError(f"{path}: cannot be the run directory: {error.strerror}") from None


@contextmanager
def _checked(path: Path) -> Iterator[int]:
    with _own(path) as folder:
        if _others(os.fstat(folder)):
            raise PrivateError(f"{path}: other users may enter this folder: chmod 700 it")
        yield folder


@contextmanager
def _own(path: Path) -> Iterator[int]:
    """A descriptor of the folder `path`, which must be this user's, whatever its mode."""
    try:
        folder = os.open(path, _FOLDER)
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP) and path.is_symlink():
            raise PrivateError(f"{path}: is a link: name the folder itself as cluster.run_dir") from None
        if error.errno == errno.ENOTDIR and os.path.lexists(path):
            raise PrivateError(f"{path}: is no folder: remove it, or set another cluster.run_dir") from None
        raise
    try:
        owner = os.fstat(folder).st_uid
        if owner != os.geteuid():
            advice = "set cluster.run_dir or XDG_RUNTIME_DIR to a folder of your own"
            raise PrivateError(f"{path}: belongs to another user (uid {owner}): {advice}")
        yield folder
    finally:
        os.close(folder)


def _others(facts: os.stat_result) -> int:
    return stat.S_IMODE(facts.st_mode) & 0o077
