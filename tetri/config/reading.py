"""The strict TOML loader. An unknown key, a wrong type or a value out of range raises a ConfigError: one line that
names the file, the key and what is allowed."""

from __future__ import annotations

import dataclasses
import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tetri.config.checks import contradictions
from tetri.config.tables import Config, WorkerConfig
from tetri.strict import ConfigError, section, types

_SECTIONS: dict[str, type] = {f.name: type(f.default) for f in dataclasses.fields(Config) if f.name != "workers"}


def default_path() -> Path:
    """The configuration file to use if none is given: $TETRI_CONF, or conf/default.toml of the checkout."""
    return Path(os.environ.get("TETRI_CONF") or Path(__file__).parents[2] / "conf" / "default.toml")


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file and apply `overrides`, "section.key=value" or "worker.IID.key=value". Raises ConfigError."""
    where, path = str(path), Path(os.path.expanduser(path))  # as in --conf=~/FILE, which no shell expands
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # no UTF-8, no TOML, too many digits or too deep nesting
        raise ConfigError(f"{where}: not a TOML file: {error}") from None
    for override in overrides:
        _override(tables, override)
    config = _config(tables, where)
    config = _with_whole_paths(config, path)
    for problem in contradictions(config):
        raise ConfigError(f"{where}: {problem}")
    return config


def dump(config: Config) -> str:
    """The configuration as TOML, with every default written out and `run_dir` resolved."""
    cluster = dataclasses.replace(config.cluster, run_dir=str(config.run_dir))
    tables = [(f"[{name}]", getattr(config, name)) for name in _SECTIONS]
    tables[0] = ("[cluster]", cluster)
    lines = []
    for title, table in [*tables, *(("[[worker]]", worker) for worker in config.workers)]:
        lines.append(title)
        # JSON strings, numbers and booleans are valid TOML, except for DEL in a string.
        values = dataclasses.asdict(table).items()
        lines += [f"{k} = {json.dumps(v, ensure_ascii=False)}".replace("\x7f", "\\u007f") for k, v in values]
        lines.append("")
    return "\n".join(lines)


def _override(tables: dict[str, Any], override: str) -> None:
    key, equals, text = (part.strip() for part in override.partition("="))
    parts = key.split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set {override!r}: write section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text  # a string without quotes
    if parts == ["worker"]:
        tables["worker"] = value
        return
    kind: type
    if len(parts) == 3 and parts[0] == "worker":
        table, kind = _worker_table(tables, parts[1], key), WorkerConfig
    elif len(parts) == 2 and parts[0] in _SECTIONS:
        table, kind = tables.setdefault(parts[0], {}), _SECTIONS[parts[0]]
    else:
        raise ConfigError(f"--set {key}: unknown key; sections: {', '.join(_SECTIONS)}, worker.IID")
    if types(kind).get(parts[-1]) is str and not isinstance(value, str):
        value = text  # cpus=0 means the text "0"
    if isinstance(table, dict):
        table[parts[-1]] = value


def _worker_table(tables: Mapping[str, Any], iid: str, key: str) -> Any:
    workers = tables.get("worker", [])
    for table in workers if isinstance(workers, list) else []:
        if isinstance(table, dict) and table.get("iid") == iid:
            return table
    raise ConfigError(f"--set {key}: the configuration has no [[worker]] with iid = {iid!r}")


def _config(tables: Mapping[str, Any], where: str) -> Config:
    unknown = sorted(set(tables) - set(_SECTIONS) - {"worker"})
    if unknown:
        raise ConfigError(f"{where}: {unknown[0]}: unknown section; allowed: {', '.join(_SECTIONS)}, worker")
    sections = {name: section(kind, tables.get(name, {}), where, name) for name, kind in _SECTIONS.items()}
    workers = tables.get("worker", [])
    if not isinstance(workers, list):
        raise ConfigError(f"{where}: worker: must be a list of tables, written as [[worker]]")
    listed = tuple(section(WorkerConfig, table, where, f"worker {i}") for i, table in enumerate(workers, 1))
    return Config(**sections, workers=listed)


def _with_whole_paths(config: Config, path: Path) -> Config:
    """Make paths absolute, since the processes run in another folder: predictor.folder is relative to the current
    folder, engine.cost to the folder `cost` beside the configuration file."""
    if config.predictor.folder:
        folder = os.path.abspath(config.predictor.folder)
        config = dataclasses.replace(config, predictor=dataclasses.replace(config.predictor, folder=folder))
    if not config.engine.table:
        return config
    cost = (path.parent / "cost" / config.engine.table).absolute()
    if not cost.is_file():
        raise ConfigError(f"{path}: engine.cost: there is no file {cost}")
    return dataclasses.replace(config, engine=dataclasses.replace(config.engine, cost=str(cost)))
