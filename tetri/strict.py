"""Strict reading of untrusted tables into frozen dataclasses: unknown keys, wrong types and values out of range are
errors.

A dataclass declares the allowed values of its fields with `number`, `text`, `path` and `choice`; a plain `str` or
`bool` default allows any value of that type.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable
from dataclasses import field
from functools import partial
from typing import Any

REQUIRED: Any = dataclasses.MISSING  # as a default: the key must be given
SHOWN_CHARS = 200  # most characters of a wrong value in an error
_json = partial(json.dumps, ensure_ascii=False, default=str)


class ConfigError(ValueError):
    """The configuration is invalid; one line that names the file and key, and states what is allowed."""


def number(default: float, low: float, high: float, was: str = "") -> Any:
    """A field for a number from `low` to `high`; a whole number if `default` is one. `was`: the field's earlier name,
    which raises an error that names the new one."""
    return field(default=default, metadata={"range": (low, high), "was": was})


def text(default: Any, pattern: str, allowed: str) -> Any:
    """A field for a text that matches all of `pattern`; `allowed` describes such texts in errors."""
    return field(default=default, metadata={"pattern": pattern, "allowed": allowed, "type": str})


def path(default: str, allowed: str) -> Any:
    """A field for a file, a folder or an ipc:// address; `~` and `~user` at the beginning of its path are expanded."""
    return field(default=default, metadata={"pattern": r"[^\0]*", "allowed": allowed, "type": str, "path": True})


def choice(default: Any, *names: str) -> Any:
    """A field for one of these names."""
    return field(default=default, metadata={"names": names, "type": str})


def section(kind: type, table: Any, where: str, name: str) -> Any:
    """A dataclass `kind` with the values of `table`, which is table [name] of file `where`. Raises ConfigError."""
    if not isinstance(table, dict):
        raise ConfigError(f"{where}: {name}: must be a table, written as [{name.split()[0]}]")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key, value in table.items():
        place = f"{where}: {name}.{key}"
        renamed = next((f.name for f in fields.values() if f.metadata.get("was") == key), None)
        if renamed is not None:
            raise ConfigError(f"{place}: is called {renamed} now: rename it")
        if key not in fields:
            raise ConfigError(f"{place}: unknown key; allowed: {', '.join(fields)}")
        problem = _problem(fields[key], types(kind)[key], value)
        if problem:
            raise ConfigError(f"{place}: {problem}, got {shown(value, _json, SHOWN_CHARS)}")
    missing = [f.name for f in fields.values() if f.default is dataclasses.MISSING and f.name not in table]
    if missing:
        raise ConfigError(f"{where}: {name}: {missing[0]} is missing")
    return kind(**{key: _converted(fields[key], types(kind)[key], value) for key, value in table.items()})


def shown(value: Any, write: Callable[[Any], str], most: int) -> str:
    """A wrong value for an error: what `write` makes of it, cut off after `most` characters."""
    try:
        text = write(value)
    except (ValueError, RecursionError):  # more digits or more levels than Python writes
        return "something enormous"
    return text if len(text) <= most else f"{text[:most]}..."


def types(kind: type) -> dict[str, type]:
    """The type of each field's value."""
    return {f.name: f.metadata.get("type") or type(f.default) for f in dataclasses.fields(kind)}


def _problem(f: dataclasses.Field[Any], kind: type, value: Any) -> str | None:
    """What is wrong with a value, as the middle part of an error line; None if it is valid."""
    if kind is bool:
        return None if isinstance(value, bool) else "must be true or false"
    if kind is str:
        return _text_problem(f, value)
    low, high = f.metadata["range"]
    text = "a whole number" if kind is int else "a number"
    fits = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    if fits and low <= value <= high:  # never true for NaN
        return None
    return f"must be {text} from {low} to {high}"


def _converted(f: dataclasses.Field[Any], kind: type, value: Any) -> Any:
    """The value of a valid setting, as the dataclass has it."""
    if f.metadata.get("path"):
        return _expanded(value)
    return float(value) if kind is float else value


def _text_problem(f: dataclasses.Field[Any], value: Any) -> str | None:
    if not isinstance(value, str):
        return "must be a text"
    names = f.metadata.get("names")
    if names is not None:
        shown = ", ".join(name or '""' for name in names)
        return None if value in names else f"must be one of: {shown}"
    pattern = f.metadata.get("pattern")
    if pattern and not re.fullmatch(pattern, value):
        return f"must be {f.metadata['allowed']}"
    if f.metadata.get("path") and (home := _expanded(value).removeprefix("ipc://").partition("/")[0]).startswith("~"):
        return f"the home folder of {home} is not known: write the whole path"
    return None


def _expanded(path: str) -> str:
    scheme = "ipc://" if path.startswith("ipc://") else ""
    return scheme + os.path.expanduser(path.removeprefix(scheme))
