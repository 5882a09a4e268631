"""A case of torture: what it measures, and within which limits."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tetri.bench.deployment import EXPECTED, own_folder
from tetri.bench.report import BenchError, progress

#: Most that a fault may add to the worst gap between two tokens of somebody else, in milliseconds. The gaps without the
#: fault are measured in the same run, so that a slow or busy machine alone breaks no limit.
ADDED_GAP_MS = 200.0


@dataclass
class Findings:
    """What one case has measured. `broken`: a line for each limit that is not kept."""

    figures: dict[str, Any] = field(default_factory=dict)
    limits: dict[str, str] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    def note(self, name: str, value: Any) -> None:
        """Record a figure without a limit."""
        self.figures[name] = value

    def at_most(self, name: str, value: float, limit: float) -> None:
        """Record a figure that must not exceed `limit`."""
        self._limited(name, value, f"at most {limit:g}", value <= limit)

    def at_least(self, name: str, value: float, limit: float) -> None:
        """Record a figure that must not be below `limit`."""
        self._limited(name, value, f"at least {limit:g}", value >= limit)

    def exactly(self, name: str, value: Any, wanted: Any) -> None:
        """Record a figure that must have one value."""
        self._limited(name, value, f"must be {wanted}", value == wanted)

    def _limited(self, name: str, value: Any, limit: str, kept: bool) -> None:
        self.figures[name], self.limits[name] = value, limit
        if not kept:
            self.broken.append(f"{name} is {value}, {limit}")


@dataclass(frozen=True, slots=True)
class Case:
    """`about`: the fault, in a few words. `run`, given a folder of its own, brings it about and records what happens;
    it may raise BenchError and the errors of deployment.EXPECTED."""

    name: str
    about: str
    run: Callable[[Path, Findings], None]


def judged(case: Case) -> dict[str, Any]:
    """Run a case. `ok`: it came to its end, and all its limits are kept."""
    start, found = time.monotonic(), Findings()
    try:
        with own_folder("torture") as folder:
            case.run(folder, found)
    except (BenchError, *EXPECTED) as error:
        found.broken.append(f"it could not go on: {error}")
    except Exception as error:  # also a fault of this program is one case's: the others are still of use
        progress(traceback.format_exc())
        found.broken.append(f"it failed: {error!r}")
    found.note("seconds", round(time.monotonic() - start, 1))
    return {
        "name": case.name,
        "ok": not found.broken,
        "figures": found.figures,
        "limits": found.limits,
        "broken": found.broken,
    }
