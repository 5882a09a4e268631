"""Types of options that name files and folders. Those that a command writes are tried when the command line is read,
before the work.

A command prints its results first and writes files after that, so that it loses nothing if writing fails.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import click

from tetri import atomic


class HomePath(click.Path):
    """A path that may begin with ~, which no shell expands in --out=~/FILE."""

    def __init__(self, **allowed: bool) -> None:
        super().__init__(path_type=Path, **allowed)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path. Raises UsageError."""
        return Path(os.fsdecode(super().convert(os.path.expanduser(value), param, ctx)))


class OutFile(HomePath):
    """A file to create or to replace."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path; of a symbolic link, its target. Raises UsageError if the file cannot be written."""
        path = super().convert(value, param, ctx)
        try:
            if path.is_symlink():
                path = Path(os.path.realpath(path))  # the link stays
            if not path.absolute().parent.is_dir():
                raise click.UsageError(f"{_name(param)}: there is no folder {path.absolute().parent}", ctx)
            atomic.check(path)
        except OSError as error:
            raise _refused(path, error, param, ctx) from None
        return path


class OutPlot(OutFile):
    """A PNG to create or to replace."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path. Raises UsageError if matplotlib is missing or the file cannot be written."""
        if Path(value).suffix.lower() != ".png":
            raise click.UsageError(f"{_name(param)} draws a PNG: call it FILE.png, not {str(value)!r}", ctx)
        os.environ["MPLBACKEND"] = "agg"  # opens no window; matplotlib refuses to be imported with an unknown one
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise click.UsageError("plots need matplotlib: pip install 'tetri[plot]'", ctx) from None
        return super().convert(value, param, ctx)


class OutFolder(HomePath):
    """A folder to write to, or to create with its parents. `new`: it must not exist."""

    def __init__(self, new: bool = False) -> None:
        super().__init__(file_okay=False)
        self._new = new

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path. Raises UsageError if nothing can be written to it."""
        path = super().convert(value, param, ctx)
        try:
            if self._new and path.exists():
                raise click.UsageError(f"{_name(param)}: {path} exists already", ctx)
            there = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            raise _refused(path, error, param, ctx) from None
        return path


FILE, FOLDER = HomePath(dir_okay=False), HomePath(file_okay=False)
OUT_FILE, OUT_PLOT, OUT_FOLDER, NEW_FOLDER = OutFile(), OutPlot(), OutFolder(), OutFolder(new=True)


def _name(param: click.Parameter | None) -> str:
    return param.opts[0] if param else "the output"


def _refused(path: Path, error: OSError, param: click.Parameter | None, ctx: click.Context | None) -> click.UsageError:
    return click.UsageError(f"{_name(param)}: {path} cannot be written: {error.strerror}", ctx)
