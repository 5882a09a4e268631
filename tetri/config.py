"""What a deployment is: frozen dataclasses, filled by one strict TOML loader.

Every default stands here and nowhere else. A key that does not exist, a wrong type or a value out of range is
a ConfigError: one line that names the file, the key and what is allowed.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tetri.policy.rules import TABLES, Rules
from tetri.request import blocks_for
from tetri.strict import REQUIRED, ConfigError, choice, number, section, types, word

_RULES = Rules()
IPC_BYTES = 100  # a Unix socket's path holds 108 bytes at most; ZeroMQ needs a few of them
CLUSTER_NAME = r"[a-z0-9-]{1,20}"
_CPUS = r"(\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*)?"


def _cpus() -> Any:
    return word("", _CPUS, 'CPU numbers such as "0", "0-1" or "0,2"; "" pins nothing')


@dataclass(frozen=True, slots=True)
class Cluster:
    name: str = word("tetri", CLUSTER_NAME, "1 to 20 of a-z, 0-9 and -")  # part of shared-memory names
    run_dir: str = word("", r"[^\0]*", "a folder")  # "": $XDG_RUNTIME_DIR/tetri, or /tmp/tetri-<uid>
    beat_s: float = number(0.2, 0.01, 60)
    dead_s: float = number(20.0, 0.1, 3600)  # silence that means dead; longer than the longest chunk
    patience_s: float = number(60.0, 0, 86400)  # how long a request may wait when no worker can take it


@dataclass(frozen=True, slots=True)
class Broker:
    clients: str = ""  # "": ipc://<run_dir>/clients; or tcp://127.0.0.1:PORT
    max_open: int = number(4096, 1, 1 << 20)
    client_grace_s: float = number(5.0, 0, 3600)
    cpus: str = _cpus()


@dataclass(frozen=True, slots=True)
class Model:
    name: str = word("smollm2-135m", r"[^\0]+", "a known model's name or a folder")
    dtype: str = choice("bfloat16", "bfloat16", "float32")
    context: int = number(0, 0, 1 << 24)  # tokens; 0: the model's own


@dataclass(frozen=True, slots=True)
class Engine:
    kind: str = choice("vllm", "vllm", "emulated")
    chunk_tokens: int = number(512, 1, 1 << 20)
    max_batch: int = number(32, 1, 1 << 14)
    block_tokens: int = number(128, 1, 1 << 14)
    kv_mib: int = number(1024, 1, 1 << 24)


@dataclass(frozen=True, slots=True)
class Emulated:
    blocks: int = number(4096, 1, 1 << 24)
    token_bytes: int = number(64, 1, 1 << 20)
    vocabulary: int = number(32000, 257, 1 << 24)  # more than 256: ids below that are bytes
    context: int = number(8192, 2, 1 << 24)
    cost: str = ""  # a file in the folder `cost` beside the configuration, or a whole path; "": no cost
    time_scale: float = number(1.0, 0, 1000)


@dataclass(frozen=True, slots=True)
class Transfer:
    transport: str = choice("shm", "shm", "local")
    slab_blocks: int = number(64, 1, 1 << 20)
    reserve_share: float = number(0.5, 0.01, 1)
    digest: bool = True  # of every chunk, checked over the receiver's own copy
    offer_s: float = number(1.0, 0.01, 60)  # an unanswered offer or chunk is sent again after this


@dataclass(frozen=True, slots=True)
class Policy:
    prefill_route: str = choice(_RULES.prefill_route, *TABLES["prefill_route"])
    decode_route: str = choice(_RULES.decode_route, *TABLES["decode_route"])
    order: str = choice(_RULES.order, *TABLES["order"])
    sched_batch: int = number(16, 1, 1 << 20)  # prompts that are ordered together
    chunk: str = choice(_RULES.chunk, *TABLES["chunk"])
    admit: str = choice(_RULES.admit, *TABLES["admit"])


@dataclass(frozen=True, slots=True)
class Worker:
    iid: str = word(  # logs and programs bear its name beside those two
        REQUIRED, r"(?!(broker|supervisord)$)[a-z0-9]{1,16}", "1 to 16 of a-z and 0-9, not broker or supervisord"
    )
    role: str = choice(REQUIRED, "prefill", "decode")
    cpus: str = _cpus()


@dataclass(frozen=True, slots=True)
class Config:
    """One deployment. `workers` is the list of [[worker]] tables, in order."""

    cluster: Cluster = Cluster()
    broker: Broker = Broker()
    model: Model = Model()
    engine: Engine = Engine()
    emulated: Emulated = Emulated()
    transfer: Transfer = Transfer()
    policy: Policy = Policy()
    workers: tuple[Worker, ...] = ()

    @property
    def run_dir(self) -> Path:
        """The folder of this deployment's sockets, logs and state, absolute."""
        return Path(self.cluster.run_dir).absolute() if self.cluster.run_dir else default_run_dir()

    @property
    def clients_address(self) -> str:
        return self.broker.clients or f"ipc://{self.run_dir}/clients"

    @property
    def events_address(self) -> str:
        return f"ipc://{self.run_dir}/events"

    def inbox_address(self, iid: str) -> str:
        return f"ipc://{self.run_dir}/inbox-{iid}"

    def worker(self, iid: str) -> Worker:
        """The [[worker]] table of `iid`; a ConfigError that lists the known ones otherwise."""
        for worker in self.workers:
            if worker.iid == iid:
                return worker
        raise ConfigError(f"no worker {iid!r}; known: {', '.join(w.iid for w in self.workers)}")


_SECTIONS: dict[str, type] = {
    f.name: type(f.default) for f in dataclasses.fields(Config) if f.name != "workers"
}


def default_run_dir() -> Path:
    base = os.environ.get("XDG_RUNTIME_DIR")
    return Path(base) / "tetri" if base else Path(f"/tmp/tetri-{os.getuid()}")


def default_path() -> Path:
    """The configuration file to use when none is named: $TETRI_CONF, or conf/default.toml of the checkout."""
    return Path(os.environ.get("TETRI_CONF") or Path(__file__).parent.parent / "conf" / "default.toml")


def cpu_numbers(text: str) -> frozenset[int]:
    """The CPUs that a `cpus` value such as "0-1,4" names; empty for ""."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file; `overrides` are "section.key=value" or "worker.IID.key=value". Raises ConfigError."""
    where = str(path)
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # bytes that are no text, an endless number, deep nesting
        raise ConfigError(f"{where}: not a TOML file: {error}") from None
    for override in overrides:
        _override(tables, override)
    config = _config(tables, where)
    config = _with_cost_path(config, Path(path))
    for problem in _contradictions(config):
        raise ConfigError(f"{where}: {problem}")
    return config


def dump(config: Config) -> str:
    """The whole configuration as TOML, every default written out and `run_dir` resolved."""
    cluster = dataclasses.replace(config.cluster, run_dir=str(config.run_dir))
    tables = [(f"[{name}]", getattr(config, name)) for name in _SECTIONS]
    tables[0] = ("[cluster]", cluster)
    lines = []
    for title, table in [*tables, *(("[[worker]]", worker) for worker in config.workers)]:
        lines.append(title)
        # JSON's strings, numbers and booleans are TOML's too, but for DEL
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
        value = text  # a bare word
    if parts == ["worker"]:
        tables["worker"] = value
        return
    kind: type
    if len(parts) == 3 and parts[0] == "worker":
        table, kind = _worker_table(tables, parts[1], key), Worker
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
    listed = tuple(section(Worker, table, where, f"worker {i}") for i, table in enumerate(workers, 1))
    return Config(**sections, workers=listed)


def _with_cost_path(config: Config, path: Path) -> Config:
    if not config.emulated.cost:
        return config
    cost = (path.parent / "cost" / config.emulated.cost).absolute()
    if not cost.is_file():
        raise ConfigError(f"{path}: emulated.cost: there is no file {cost}")
    return dataclasses.replace(config, emulated=dataclasses.replace(config.emulated, cost=str(cost)))


def _contradictions(config: Config) -> Iterator[str]:
    iids = [worker.iid for worker in config.workers]
    for iid in sorted({iid for iid in iids if iids.count(iid) > 1}):
        yield f"worker.iid: {iid!r} is used {iids.count(iid)} times; every worker needs its own"
    for role in ("prefill", "decode"):
        if role not in {worker.role for worker in config.workers}:
            yield f'worker: at least one [[worker]] with role = "{role}" is needed'
    if config.cluster.dead_s < 3 * config.cluster.beat_s:
        yield f"cluster.dead_s: must be at least three times beat_s ({config.cluster.beat_s:g} s)"
    chunk, block = config.engine.chunk_tokens, config.engine.block_tokens
    if config.transfer.slab_blocks < (least := blocks_for(chunk + block - 1, block)):
        yield f"transfer.slab_blocks: must be at least {least}, the blocks that one chunk may fill"
    for place, cpus in [("broker.cpus", config.broker.cpus)] + [
        (f"worker {w.iid}.cpus", w.cpus) for w in config.workers
    ]:
        if cpus and not cpu_numbers(cpus):
            yield f"{place}: {cpus!r} names no CPU"
    if config.broker.clients:
        yield from _address_problem(config.broker.clients)
    for address in (config.clients_address, config.events_address, *map(config.inbox_address, iids)):
        if address.startswith("ipc://") and len(os.fsencode(address[6:])) >= IPC_BYTES:
            yield f"cluster.run_dir: {address[6:]} must be under {IPC_BYTES} bytes; choose a shorter run_dir"


def _address_problem(address: str) -> Iterator[str]:
    if re.fullmatch(r"ipc:///[^\0]+", address):
        return
    parts = re.fullmatch(r"tcp://(\[[^\]]+\]|[^:/\[\]]+):(\d{1,5})", address)
    if not parts or not 0 < int(parts[2]) < 65536:
        yield f'broker.clients: must be "ipc:///path", "tcp://127.0.0.1:PORT" or "", got "{address}"'
    elif not _is_loopback(parts[1].strip("[]")):
        yield (
            f"broker.clients: {parts[1]} is not this machine's IPv4 loopback; encryption (CURVE) between hosts is"
            " not built yet, so use 127.0.0.1"
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.IPv4Address(host).is_loopback  # the sockets are opened without IPv6
    except ValueError:  # a name, or *
        return False
