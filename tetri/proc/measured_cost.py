"""engine.cost = "auto": the cost table of this machine, measured at the first start and kept in the cache.

A file in `<cache>/cost` belongs to all that step times depend on: the engine, its version and its speed in this version
of tetri, the weights, the processor, the number of threads and the sizes of a step. Only one worker measures at a time,
after the others on this machine have built their engines, and none builds one meanwhile: otherwise they would measure
each other. They hold a lock file together while they build, and the one that measures holds it alone. The others read
what it has measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from glob import escape
from logging import Logger
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from tetri import atomic, cost
from tetri.config import Config
from tetri.control_groups import threads
from tetri.cost import Cost, CostError
from tetri.engine.base import Engine, EngineError
from tetri.models import ModelError, cache

BUDGET_S = 12.0  # of a measurement; the scene that runs then is the last one
LONGEST_S = 60.0  # that it may take on a slow or busy machine until all scenes have run once; else it has failed
ROUNDS = 5  # most measurements of each point
WAIT_S = 90.0  # longest wait for other workers; one that hangs must not keep this one from serving
POLL_S = 0.1
SPEED = 2  # raised when tetri's engine gets another speed, so that older tables are not read


def folder() -> Path:
    """Where measured tables are kept. Raises ModelError."""
    return cache() / "cost"


def kept(model: str = "") -> list[Path]:
    """The files of the tables that are kept, of one model or of all, the newest first. Raises ModelError."""
    name = f"{Path(model).name}-" if model else ""
    return sorted(folder().glob(f"{escape(name)}*.toml"), key=lambda path: path.stat().st_mtime, reverse=True)


def path_of(engine: Engine, config: Config) -> Path:
    """The file of the table of this engine in this process. Raises ModelError."""
    mark, capacity = engine.fingerprint, engine.capacity
    sizes = [capacity.chunk_tokens, capacity.max_batch, capacity.context]
    key = json.dumps([msgspec.to_builtins(mark), processor(), threads(), *sizes, SPEED])
    return folder() / f"{Path(config.model.name).name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.toml"


def processor(proc: Path = Path("/proc")) -> str:
    """The name of this machine's processor, and of each kind of GPU that it has."""
    cpu = _values(proc / "cpuinfo", "model name")[:1] or ["an unknown CPU"]
    gpus = [_values(path, "Model") for path in proc.glob("driver/nvidia/gpus/*/information")]
    return ", ".join([*cpu, *sorted({name for names in gpus for name in names})])


def _values(path: Path, key: str) -> list[str]:
    """What follows `key:` in the lines of a file; nothing if it cannot be read."""
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = path.read_text(encoding="utf-8").splitlines()
    pairs = [line.partition(":") for line in lines]
    return [value.strip() for name, _, value in pairs if name.strip() == key]


def described(engine: Engine, config: Config) -> str:
    """Engine, model and cores, in words."""
    mark, cores = engine.fingerprint, threads()
    real = mark.engine == "vllm"
    model = Path(config.model.name).name if real else mark.model
    count = "1 core" if cores == 1 else f"{cores} cores"
    name = "vLLM" if real else mark.engine
    return f"{name} {mark.version}, {model} {mark.dtype}, {count} of {processor()} ({mark.isa})"


def kv_of(engine: Engine) -> dict[str, Any]:
    """The keys of a cost table that describe the KV of this engine."""
    capacity = engine.capacity
    token_bytes = engine.fingerprint.block_bytes // capacity.block_tokens
    return {"kv_token_bytes": token_bytes, "kv_tokens": capacity.tokens}


def keep(table: Cost, path: Path, comments: Sequence[str]) -> None:
    """Write a table to a file of the cache; workers of such an engine use it from their next start on. Raises
    OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, cost.dump(table, comments))


class Turn:
    """The lock of the workers of this machine: held together while they build their engines, alone to measure."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def hold(self, *, alone: bool) -> None:
        """Hold the lock, or go on without it after WAIT_S seconds."""
        until = time.monotonic() + WAIT_S
        while time.monotonic() < until:
            try:
                fcntl.flock(self._file, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(POLL_S)
            else:
                return

    def release(self) -> None:
        """Release the lock, also where a child process has inherited it."""
        fcntl.flock(self._file, fcntl.LOCK_UN)

    def close(self) -> None:
        """Release the lock and close its file."""
        self.release()
        os.close(self._file)


@contextlib.contextmanager
def turn(config: Config, logger: Logger) -> Iterator[Turn | None]:
    """Hold the lock together with others, for as long as the engine is built and `of_engine` runs. None if this
    configuration does not measure, or nothing can be written to the cache."""
    if not config.engine.measures:
        yield None
        return
    try:
        folder().mkdir(parents=True, exist_ok=True)
        lock = Turn(folder() / ".lock")
    except (OSError, ModelError) as error:
        logger.warning("a cost table that is measured now cannot be kept: %s", error)
        yield None
        return
    try:
        lock.hold(alone=False)
        yield lock
    finally:
        lock.close()


def of_engine(
    engine: Engine, config: Config, clock: Callable[[], float], lock: Turn | None, logger: Logger
) -> Cost | None:
    """The table of this engine: from the cache, else measured now by this clock (`clock_of`). None if the configuration
    does not measure, or a measurement fails; the log says why."""
    if not config.engine.measures:
        return None
    found = _kept(engine, config, logger)
    if found is None and lock is not None:
        lock.hold(alone=True)
        found = _kept(engine, config, logger)  # another worker may have measured it
    if found is not None:
        return found
    table, comment = _measured(engine, config, clock, logger)
    if table is not None and lock is not None:
        try:
            keep(table, path_of(engine, config), [comment])
        except OSError as error:
            logger.warning("the cost table cannot be kept: %s", error)
    return table


def _kept(engine: Engine, config: Config, logger: Logger) -> Cost | None:
    try:
        path = path_of(engine, config)
        return cost.load(path) if path.exists() else None
    except (CostError, ModelError, OSError) as error:
        logger.warning("the cost table is measured again: %s", error)
        return None


def clock_of(config: Config, *, gpu: bool) -> Callable[[], float]:
    """The clock that measures steps. On one core it counts only the time in which this process computes, which other
    programs on that core do not change."""
    alone = config.engine.kind == "vllm" and not gpu and threads() == 1
    return time.process_time if alone else time.perf_counter


def _measured(engine: Engine, config: Config, clock: Callable[[], float], logger: Logger) -> tuple[Cost | None, str]:
    """The table, and how it was measured."""
    from tetri.profile.fit import fit  # numpy comes with it
    from tetri.profile.measure import ProfileError, measure
    from tetri.profile.scenes import brief

    start = time.monotonic()

    def enough(complete: bool) -> bool:
        return time.monotonic() - start > (BUDGET_S if complete else LONGEST_S)

    try:
        made = fit(measure(engine, brief(engine.capacity), ROUNDS, clock, Random(0), enough=enough))
    except (ProfileError, EngineError, CostError) as error:
        logger.warning("the cost table could not be measured: %s", error)
        return None, ""
    how = f"measured in {time.monotonic() - start:.1f} s, {made.quality['fitted'].mean:.1%} off on average"
    logger.info("the cost table was %s", how)
    source = f"{described(engine, config)}, {time.strftime('%Y-%m-%d')}, at a worker's start"
    comment = f"By a worker at its start: {how}. docs/cost.md says what each key means."
    return dataclasses.replace(made.cost, **kv_of(engine), source=source), comment
