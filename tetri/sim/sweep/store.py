"""The results of the runs of a sweep, one JSON line each, so that an interrupted sweep goes on where it was.

A result is used again only for the same requests, limits and arrangement (`digest`); one of `auto` also only for the
same sources of cores and policies, so that a changed policy is measured again while the fixed arrangements are not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from tetri import cost as costs
from tetri.sim.sweep import evaluate, quick
from tetri.sim.sweep.arrangements import AUTO, Arrangement
from tetri.sim.sweep.cases import Case
from tetri.sim.sweep.results import Attainment, Result, Spread

#: What a run of `auto` depends on.
SOURCES = (
    *("core", "policy", "cost.py", "executor.py", "engine/paged.py", "engine/plan.py"),
    *("sim/instance.py", "sim/kernel.py", "sim/links.py", "sim/nodes.py", "sim/scripted.py", "sim/world.py"),
)


class StoreError(ValueError):
    """The file of results cannot be read; one line that says why."""


class Store:
    """The results in a file, by case, arrangement and rate. Several processes may add to it."""

    def __init__(self, path: Path) -> None:
        """Read the file, if there is one. Raises StoreError."""
        self.path = path
        self._results: dict[str, dict[float, Result]] = {}
        try:
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        except OSError as error:
            raise StoreError(f"{path}: cannot be read: {error.strerror}") from None
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                self._keep(row["key"], _result(row["result"]))
            except (ValueError, KeyError, TypeError):
                if number < len(lines):  # the last line may have been cut off
                    raise StoreError(f"{path}:{number}: not a result of a sweep: give another file") from None

    def __len__(self) -> int:
        """Number of results."""
        return sum(map(len, self._results.values()))

    def known(self, case: Case, arrangement: Arrangement) -> list[Result]:
        """The results at all rates, the lowest first."""
        found = self._results.get(key(case, arrangement), {})
        return [found[rate] for rate in sorted(found)]

    def add(self, case: Case, arrangement: Arrangement, result: Result, cpu_s: float) -> None:
        """Append a result, which took so much time to compute, to the file. Raises StoreError."""
        name = key(case, arrangement)
        self._keep(name, result)
        line = json.dumps({"key": name, "cpu_s": round(cpu_s, 3), "result": asdict(result)}) + "\n"
        try:
            with open(self.path, "ab", buffering=0) as file:  # one write: lines of several processes do not mix
                file.write(line.encode())
        except OSError as error:
            raise StoreError(f"{self.path}: cannot be written: {error.strerror}") from None

    def _keep(self, name: str, result: Result) -> None:
        self._results.setdefault(name, {})[result.rate] = result


def key(case: Case, arrangement: Arrangement) -> str:
    """What a result belongs to."""
    name = case.name if arrangement.kind == AUTO else case.cell
    return f"{name} {arrangement.name} {_digest(case, arrangement)}"


@cache
def _digest(case: Case, arrangement: Arrangement) -> str:
    """A digest of all that a result depends on, except the rate."""
    parts: list[Any] = [case.arrivals_digest, costs.load(case.cost), arrangement, case.slo("balanced")]
    parts += [quick.SLOTS, quick.LINK_BYTES_S, case.counted(case.requests)]
    if arrangement.kind not in evaluate.QUICK:
        parts += [evaluate.LOAD_S, evaluate.RULES]
    if arrangement.kind == AUTO:
        parts += [evaluate.CHUNK_TOKENS, _sources()]
    return sha256(repr(parts).encode()).hexdigest()[:12]


@cache
def _sources() -> str:
    folder = Path(__file__).parents[2]
    made = sha256()
    for source in SOURCES:
        place = folder / source
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            made.update(path.read_bytes())
    return made.hexdigest()


def _result(row: Mapping[str, Any]) -> Result:
    attained = {name: Attainment(each["share"], tuple(each["quartiles"])) for name, each in row["attained"].items()}
    spreads = {name: None if row[name] is None else Spread(**row[name]) for name in ("ttft", "tpot", "jct")}
    return Result(row["rate"], attained, certain=row["certain"], **spreads)
