"""What a core heard and said, in a file: with `[cluster] record = true` every process writes
`<run_dir>/record/<name>-<incarnation>.events`, from which `tetri-cli sim replay` builds fresh cores and feeds them
the same events. They must say the same.

The file: `tetri-events 1\\n`, then records, each four bytes of length (big endian) and one MessagePack array. The
first record holds what the core was made from, the others one call each: its verb, the time, the event, the actions.
"""

from __future__ import annotations

import logging
import os
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
from tetri.wire import clients, events, handover, messages

MAGIC = b"tetri-events 1\n"
MAX_BYTES = 64 << 20  # of one record
C = TypeVar("C")

#: every type that an event or an action may have, by its name
KINDS: dict[str, type[Any]] = {
    kind.__name__: kind
    for module in (request, engine_request, messages, handover, clients, events, actions)
    for kind in vars(module).values()
    if isinstance(kind, type) and kind.__module__ == module.__name__
}
_encoder = msgspec.msgpack.Encoder()


class RecordError(ValueError):
    """A file is no record of a core; one line that says why."""


class BrokerStart(msgspec.Struct, frozen=True, tag="broker"):
    """What a broker's core is made from. `seed` of its chance, `now` as it was."""

    limits: Limits
    rules: Rules
    epoch: int
    seed: int
    now: float
    model: str
    cost: Cost
    chunk_tokens: int

    def core(self) -> Broker:
        rng, of = Random(self.seed), (self.model, self.cost, self.chunk_tokens)
        return Broker(self.limits, self.rules, self.epoch, rng, self.now, *of)


class WorkerStart(msgspec.Struct, frozen=True, tag="worker"):
    """What a worker's core is made from."""

    own: Identity
    seed: int
    now: float

    def core(self) -> Worker:
        return Worker(self.own, Random(self.seed), self.now)


class MonitorStart(msgspec.Struct, frozen=True, tag="monitor"):
    """What a monitor's core is made from. Times in seconds."""

    flip: str
    settings: FlipSettings
    epoch: int
    load_s: float
    stale_s: float
    gone_s: float
    now: float

    def core(self) -> Monitor:
        return Monitor(
            self.flip, self.settings, self.epoch, self.load_s, self.now, stale_s=self.stale_s, gone_s=self.gone_s
        )


Start = BrokerStart | WorkerStart | MonitorStart


class RecordedCall(msgspec.Struct, frozen=True, array_like=True):
    """One call of a core: `verb` is handle or tick; `event` is empty for a tick. Values are (type's name, fields)."""

    verb: str
    now: float
    event: list[tuple[str, msgspec.Raw]]
    actions: list[tuple[str, msgspec.Raw]]


class Verbs(Protocol):
    def handle(self, event: Any, now: float) -> Sequence[Any]: ...

    def tick(self, now: float) -> Sequence[Any]: ...


class Recorder:
    """A core that writes down what it hears and says; whatever else is asked of it, the core inside answers."""

    def __init__(self, core: Verbs, start: Start, path: Path) -> None:
        self._core, self._path = core, path
        path.parent.mkdir(mode=0o700, exist_ok=True)
        # Nothing is buffered here: what a killed process has heard is in the file.
        self._file: FileIO | None = FileIO(path, "xb")
        self._file.write(MAGIC + framed(_encoder.encode(start)))

    def handle(self, event: Any, now: float) -> Sequence[Any]:
        answered = self._core.handle(event, now)
        self._write(RecordedCall("handle", now, [raw(event)], list(map(raw, answered))))
        return answered

    def tick(self, now: float) -> Sequence[Any]:
        answered = self._core.tick(now)
        self._write(RecordedCall("tick", now, [], list(map(raw, answered))))
        return answered

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, call: RecordedCall) -> None:
        """What cannot be written ends the record, not the process: what is there is good so far."""
        if self._file is None:
            return
        data = framed(_encoder.encode(call))
        try:
            written = self._file.write(data)
        except OSError as error:
            written, why = 0, error.strerror or str(error)
        else:
            why = "no room"
        if written != len(data):
            logging.getLogger("tetri.record").error("%s: nothing more is recorded: %s", self._path, why)
            self.close()


def recorded(core: C, start: Start, config: Config, name: str, incarnation: int, stack: ExitStack) -> C:
    """`core`, with a recorder around it when the cluster is to be recorded."""
    if not config.cluster.record:
        return core
    recorder = Recorder(cast(Verbs, core), start, config.run_dir / "record" / f"{name}-{incarnation:016x}.events")
    stack.callback(recorder.close)
    return cast(C, recorder)


def raw(value: Any) -> tuple[str, msgspec.Raw]:
    name = type(value).__name__
    if KINDS.get(name) is not type(value):
        raise RecordError(f"{name} is no event and no action that can be recorded")
    return name, msgspec.Raw(_encoder.encode(value))


def value(pair: tuple[str, msgspec.Raw]) -> Any:
    """The event or action that `raw` made this from."""
    name, data = pair
    if name not in KINDS:
        raise RecordError(f"there is no event or action called {name!r}")
    return msgspec.msgpack.decode(data, type=KINDS[name])


def framed(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


def read(path: Path) -> tuple[Start, Iterator[RecordedCall]]:
    """What the core was made from, and its calls in order. A last record that is cut off (its process was killed
    while it wrote) is left out. Raises RecordError, the iterator too."""
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
