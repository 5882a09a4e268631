"""Files and folders that appear whole or not at all: they are made beside their place and moved there at the end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def file(path: Path) -> Iterator[Path]:
    """Where to write what is to be `path`. It replaces the file that is there; if the body raises, nothing changes.
    Raises OSError."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """In UTF-8. Raises OSError."""
    with file(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def folder(path: Path) -> Iterator[Path]:
    """An empty folder, of the same name, to be filled. It replaces the folder that is there; if the body raises,
    nothing changes. What a killed process left is removed, so only one at a time may make the same folder. Raises
    OSError."""
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
