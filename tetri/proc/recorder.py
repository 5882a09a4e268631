"""Records the inputs and actions of a core in a file, for `tetri-cli sim replay`.

With `[cluster] record = true`, every process writes `<run_dir>/record/<name>-<incarnation>.events`, until all files of
its name have `record_mib` MiB. The replay feeds the same events to fresh cores, which must return the same actions.

The file: `tetri-events 1\\n`, then records of four bytes length (big endian) and one MessagePack value. The first
record has what the core was built from; each other record has one call: its verb, the time, the event, the actions.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from random import Random
from typing import Any, Protocol, TypeVar, cast

import msgspec

from tetri import engine_request as engine_request
from tetri import request
from tetri.config import Config
from tetri.core import actions
from tetri.core.broker.broker import Broker
from tetri.core.broker.delivery import Limits
from tetri.core.instance.identity import Identity
from tetri.core.monitor import Monitor
from tetri.core.worker.worker import Worker
from tetri.cost import Cost
from tetri.policy.rules import Rules
from tetri.policy.views import FlipSettings
from tetri.request import Slo
from tetri.wire import clients, events, handover, messages, observation

MAGIC = b"tetri-events 1\n"
MAX_BYTES = 64 << 20  # of one record
FULL = "its records have reached cluster.record_mib: move them away before the next start"
C = TypeVar("C")

# Every type of an event or an action, by its name.
KINDS: dict[str, type[Any]] = {
    kind.__name__: kind
    for module in (request, engine_request, messages, handover, observation, clients, events, actions)
    for kind in vars(module).values()
    if isinstance(kind, type) and kind.__module__ == module.__name__
}
_encoder = msgspec.msgpack.Encoder()


class RecordError(ValueError):
    """A file is not a record of a core. The message is one line."""


class BrokerStart(msgspec.Struct, frozen=True, tag="broker"):
    """What a broker's core is built from. `seed`: of its random numbers. `now`: time at its start, in seconds."""

    limits: Limits
    rules: Rules
    epoch: int
    seed: int
    now: float
    model: str
    cost: Cost
    chunk_tokens: int
    slo: Slo = Slo()

    def core(self) -> Broker:
        """Build a fresh core."""
        rng, of = Random(self.seed), (self.model, self.cost, self.chunk_tokens, self.slo)
        return Broker(self.limits, self.rules, self.epoch, rng, self.now, *of)


class WorkerStart(msgspec.Struct, frozen=True, tag="worker"):
    """What a worker's core is built from. `seed`: of its random numbers. `now`: time at its start, in seconds."""

    own: Identity
    seed: int
    now: float

    def core(self) -> Worker:
        """Build a fresh core."""
        return Worker(self.own, Random(self.seed), self.now)


class MonitorStart(msgspec.Struct, frozen=True, tag="monitor"):
    """What a monitor's core is built from. Times in seconds."""

    flip: str
    settings: FlipSettings
    epoch: int
    load_s: float
    stale_s: float
    gone_s: float
    now: float

    def core(self) -> Monitor:
        """Build a fresh core."""
        return Monitor(
            self.flip, self.settings, self.epoch, self.load_s, self.now, stale_s=self.stale_s, gone_s=self.gone_s
        )


Start = BrokerStart | WorkerStart | MonitorStart


class RecordedCall(msgspec.Struct, frozen=True, array_like=True):
    """One call of a core: `verb` is handle or tick; `event` is [] for a tick. A value is (type's name, fields)."""

    verb: str
    now: float
    event: list[tuple[str, msgspec.Raw]]
    actions: list[tuple[str, msgspec.Raw]]


class Verbs(Protocol):
    """The methods of a core that take input."""

    def handle(self, event: Any, now: float) -> Sequence[Any]:
        """Process an event at the time `now`, in seconds. Returns actions."""

    def tick(self, now: float) -> Sequence[Any]:
        """Process the timers that are due. Returns actions."""


class Recorder:
    """Wraps a core and records its inputs and actions, until `most` bytes are written. All other attributes are those
    of the core."""

    def __init__(self, core: Verbs, start: Start, path: Path, most: int = 1 << 30) -> None:
        self._core, self._path, self._left = core, path, most
        path.parent.mkdir(mode=0o700, exist_ok=True)
        # Not buffered, so that the file is complete when the process is killed.
        self._file: FileIO | None = FileIO(path, "xb")
        self._write(MAGIC + framed(_encoder.encode(start)))

    def handle(self, event: Any, now: float) -> Sequence[Any]:
        answered = self._core.handle(event, now)
        self._record("handle", now, [event], answered)
        return answered

    def tick(self, now: float) -> Sequence[Any]:
        answered = self._core.tick(now)
        self._record("tick", now, [], answered)
        return answered

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _record(self, verb: str, now: float, event: list[Any], answered: Sequence[Any]) -> None:
        if self._file is not None:
            call = RecordedCall(verb, now, list(map(raw, event)), list(map(raw, answered)))
            self._write(framed(_encoder.encode(call)))

    def _write(self, data: bytes) -> None:
        """Append data. A full record or a failed write ends the record, not the process; the record is valid up to
        there."""
        assert self._file is not None
        why = None
        try:
            if self._file.write(data) != len(data):
                why = "no space left"
        except OSError as error:
            why = error.strerror or str(error)
        self._left -= len(data)
        if why is None and self._left <= 0:
            why = FULL
        if why is not None:
            logging.getLogger("tetri.record").error("%s: nothing more is recorded: %s", self._path, why)
            self.close()


def recorded(core: C, start: Start, config: Config, name: str, incarnation: int, stack: ExitStack) -> C:
    """Return `core`, wrapped in a recorder if the configuration asks for records."""
    if not config.cluster.record:
        return core
    folder = config.run_dir / "record"
    left = (config.cluster.record_mib << 20) - _sizes(folder)[name]
    recorder = Recorder(cast(Verbs, core), start, folder / f"{name}-{incarnation:016x}.events", left)
    stack.callback(recorder.close)
    return cast(C, recorder)


def full_records(config: Config) -> list[str]:
    """A line for each process that does not record any more, since its records have reached their size."""
    if not config.cluster.record:
        return []
    sizes = _sizes(config.run_dir / "record")
    names = sorted(name for name, size in sizes.items() if size >= config.cluster.record_mib << 20)
    return [f"{name} does not record events any more: {FULL}" for name in names]


def _sizes(folder: Path) -> Counter[str]:
    """Bytes of all records by the process's name."""
    found = Counter[str]()
    for path in folder.glob("*.events"):
        found[path.name.rpartition("-")[0]] += path.stat().st_size
    return found


def raw(value: Any) -> tuple[str, msgspec.Raw]:
    """Encode an event or action as (name of its type, fields). Raises RecordError."""
    name = type(value).__name__
    if KINDS.get(name) is not type(value):
        raise RecordError(f"{name} is no event and no action that can be recorded")
    return name, msgspec.Raw(_encoder.encode(value))


def value(pair: tuple[str, msgspec.Raw]) -> Any:
    """Decode an event or action that `raw` has encoded. Raises RecordError and msgspec.MsgspecError."""
    name, data = pair
    if name not in KINDS:
        raise RecordError(f"there is no event or action called {name!r}")
    return msgspec.msgpack.decode(data, type=KINDS[name])


def framed(data: bytes) -> bytes:
    """Put the length before a record."""
    return len(data).to_bytes(4, "big") + data


def read(path: Path) -> tuple[Start, Iterator[RecordedCall]]:
    """(what the core was built from, its calls in order). Ignores an incomplete last record, which a killed process
    leaves. Raises RecordError, also while iterating."""
    try:
        records = _records(path)
        start: Start = msgspec.msgpack.decode(next(records), type=Start)
    except StopIteration:
        raise RecordError(f"{path}: no record of a core's events, or one that was cut off at its beginning") from None
    except msgspec.MsgspecError as error:
        raise RecordError(f"{path}: no record of a core's events: {error}") from None
    return start, _calls(path, records)


def _calls(path: Path, records: Iterator[bytes]) -> Iterator[RecordedCall]:
    decoder = msgspec.msgpack.Decoder(RecordedCall)
    for number, record in enumerate(records, 1):
        try:
            yield decoder.decode(record)
        except msgspec.MsgspecError as error:
            raise RecordError(f"{path}: call {number} cannot be read: {error}") from None


def _records(path: Path) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise RecordError(f"{path}: does not begin as a record of this version does")
            while len(head := file.read(4)) == 4:
                size = int.from_bytes(head, "big")
                if size > MAX_BYTES:
                    raise RecordError(f"{path}: damaged: a record of {size} bytes")
                data = file.read(size)
                if len(data) < size:
                    return
                yield data
    except OSError as error:
        raise RecordError(f"{path}: cannot be read: {os.strerror(error.errno or 0)}") from None
