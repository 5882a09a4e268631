"""The runs of a comparison that have ended, one JSON object a line, so that an interrupted comparison goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from tetri.bench.compare.load import Answer
from tetri.bench.compare.plan import Run
from tetri.bench.report import BenchError
from tetri.cost import Cost


class Settings(msgspec.Struct, tag="settings"):
    """What all runs of a file have in common."""

    values: dict[str, Any]


class Capacity(msgspec.Struct, tag="capacity"):
    """The capacity in requests per second for one workload."""

    workload: str
    rate_s: float


class Table(msgspec.Struct, tag="cost"):
    """A cost table: of an engine alone, or of a deployment's instances or servers as a client sees them. `delay_s`:
    seconds of a request besides its steps."""

    deployment: str
    cost: Cost
    delay_s: float = 0.0


class Record(msgspec.Struct, tag="run"):
    """What came of a run. `rate_s`: requests per second; `seconds`: its length; `client_cpu`: share of a CPU that the
    client used; `gaps_s`: p50, p99 and the longest time between two events of an answer; `standstill_s`: by how much
    the machine stood still at most; `error`: why there are no answers."""

    run: Run
    rate_s: float
    answers: list[Answer] = []
    seconds: float = 0.0
    client_cpu: float = 0.0
    gaps_s: tuple[float, float, float] = (0.0, 0.0, 0.0)
    standstill_s: float = 0.0
    error: str = ""

    @property
    def served(self) -> list[Answer]:
        """The requests that did not fail."""
        return [each for each in self.answers if not each.error]


_decoder = msgspec.json.Decoder(Settings | Capacity | Table | Record)


class Store:
    """The file. Another comparison with the same `settings` may add to it. `capacities`: requests per second by
    workload; `tables`: all cost tables that were measured, by whose they are."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.records: dict[Run, Record] = {}
        self.capacities: dict[str, float] = {}
        self.tables: dict[str, list[Table]] = {}
        self._settings = settings

    def read(self) -> None:
        """Read the file, if it is there. Raises BenchError if its runs were made with other settings."""
        text = self.path.read_bytes() if self.path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]  # the rest is of a comparison that was killed while it wrote
        if whole != text:
            self.path.write_bytes(whole)
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self._read_line(_decoder.decode(line))
            except msgspec.MsgspecError as error:
                raise BenchError(f"{self.path}:{number}: not a line of a comparison ({error})") from None
        if not whole:
            self.add(Settings(self._settings))

    def add(self, row: Settings | Capacity | Table | Record) -> None:
        """Add a line."""
        with open(self.path, "ab") as file:
            file.write(msgspec.json.encode(row) + b"\n")
        self._read_line(row)

    def _read_line(self, row: Settings | Capacity | Table | Record) -> None:
        match row:
            case Settings():
                self._check(row.values)
            case Capacity():
                self.capacities[row.workload] = row.rate_s
            case Table():
                self.tables.setdefault(row.deployment, []).append(row)
            case Record():
                self.records[row.run] = row

    def _check(self, found: dict[str, Any]) -> None:
        for name, value in self._settings.items():
            if (old := found.get(name)) != value:
                raise BenchError(f"{self.path} was made with {name} {old}, not {value}: choose another file (--out)")
