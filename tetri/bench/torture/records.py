"""What the processes of a deployment with `cluster.record` have sent and received."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tetri.bench.report import BenchError
from tetri.core.actions import Send
from tetri.proc.recorder import RecordedCall, read, value


def calls(folder: Path, name: str) -> Iterator[RecordedCall]:
    """The calls of a process's core, from the record in the run directory `folder`. Raises BenchError if the process
    was restarted."""
    records = [*(folder / "record").glob(f"{name}-*.events")]
    if len(records) != 1:
        raise BenchError(f"{name} has {len(records)} records instead of 1: it was restarted")
    yield from read(records[0])[1]


def sent(folder: Path, name: str, peer: str = "") -> Iterator[tuple[float, Any]]:
    """The messages that a process sent to `peer`, by default to all, each with its time."""
    for call in calls(folder, name):
        for action in call.actions:
            if action[0] == Send.__name__ and (send := value(action)).peer == (peer or send.peer):
                yield call.now, send.message
