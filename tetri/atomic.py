"""Write files and folders atomically: build them next to their destination, then rename them into place."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to. On success it replaces `path`; if the body raises, `path` does not change.
    Raises OSError, which names `path`."""
    part = _part(path)
    try:
        yield part
        part.replace(path)
    except OSError as error:
        if error.filename in (None, str(part)):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        part.unlink(missing_ok=True)


def check(path: Path) -> None:
    """Try whether `file(path)` can write now, and leave nothing behind. Raises OSError."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))  # replacing /dev/null would remove the device
    if path.exists() and not os.access(path, os.W_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    part = _part(path)
    try:
        part.write_bytes(b"\n")  # not empty: a full disk takes empty files
    finally:
        part.unlink(missing_ok=True)


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, atomically. Raises OSError."""
    with file(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder with the name of `path`. On success it replaces `path`; if the body raises,
    `path` does not change, and folders that were made for it are removed. Removes what a killed process left, so only
    one process at a time may make the same folder. Raises OSError."""
    parent = path.with_name(f".{path.name}.part")
    missing = [each for each in path.parents if not each.exists()]
    shutil.rmtree(parent, ignore_errors=True)
    part = parent / path.name
    try:
        part.mkdir(parents=True)
        yield part
        if path.exists():
            shutil.rmtree(path)
        part.rename(path)
    finally:
        shutil.rmtree(parent, ignore_errors=True)
        with suppress(OSError):  # it has the finished folder
            for each in missing:
                each.rmdir()
