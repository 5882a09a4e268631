"""Write files and folders atomically: build them next to their destination, then rename them into place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to. On success it replaces `path`; if the body raises, `path` does not change.
    Raises OSError."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, atomically. Raises OSError."""
    with file(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder with the name of `path`. On success it replaces `path`; if the body raises,
    `path` does not change. Removes what a killed process left, so only one process at a time may make the same folder.
    Raises OSError."""
    parent = path.with_name(f".{path.name}.part")
    shutil.rmtree(parent, ignore_errors=True)
    part = parent / path.name
    part.mkdir(parents=True)
    try:
        yield part
        if path.exists():
            shutil.rmtree(path)
        part.rename(path)
    finally:
        shutil.rmtree(parent, ignore_errors=True)
