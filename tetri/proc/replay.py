"""Replays a record: feeds its events to a fresh core and compares the actions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import msgspec

from tetri.proc.recorder import RecordedCall, RecordError, raw, read, value

SHOWN_CHARS = 400  # longest text of one action in a difference


@dataclass(frozen=True, slots=True)
class Replayed:
    """Result of one replay. `difference` shows the first action that differs, in a few lines; None if all are equal."""

    name: str
    kind: str
    events: int
    ticks: int
    actions: int
    difference: str | None = None


def replay(path: Path) -> Replayed:
    """Replay one record up to the first difference. Raises RecordError."""
    start, calls = read(path)
    try:
        core: Any = start.core()
    except (ValueError, LookupError) as error:  # a policy that this version does not have
        raise RecordError(f"{path}: no core can be made from it: {error}") from None
    kind = type(core).__name__.lower()
    events = ticks = actions = 0
    for number, call in enumerate(calls, 1):
        events, ticks = events + (call.verb == "handle"), ticks + (call.verb == "tick")
        answered = _play(core, call)
        actions += 0 if isinstance(answered, str) else len(answered)
        if answered != call.actions:
            found = answered if isinstance(answered, str) else _first(call.actions, answered)
            return Replayed(path.stem, kind, events, ticks, actions, f"call {number}, {_described(call)}: {found}")
    return Replayed(path.stem, kind, events, ticks, actions)


def _play(core: Any, call: RecordedCall) -> list[tuple[str, msgspec.Raw]] | str:
    """The core's actions for this call; a text if the call fails."""
    try:
        answered = core.tick(call.now) if call.verb == "tick" else core.handle(value(call.event[0]), call.now)
    except (RecordError, msgspec.MsgspecError) as error:
        return f"the event cannot be read: {error}"
    except (AssertionError, LookupError, ValueError, TypeError, AttributeError) as error:
        return f"the core fails: {error!r}"  # the recorded core did not fail here
    return [raw(action) for action in answered]


def _first(was: list[tuple[str, msgspec.Raw]], now: list[tuple[str, msgspec.Raw]]) -> str:
    for index, (old, new) in enumerate(zip_longest(was, now)):
        if old != new:
            return f"action {index + 1}\n  then {_shown(old)}\n  now  {_shown(new)}"
    raise AssertionError("the two lists are equal")


def _described(call: RecordedCall) -> str:
    return f"{call.verb} {call.event[0][0]} at {call.now:.6f}" if call.event else f"{call.verb} at {call.now:.6f}"


def _shown(pair: tuple[str, msgspec.Raw] | None) -> str:
    if pair is None:
        return "nothing"
    name, data = pair
    fields = json.dumps(msgspec.to_builtins(msgspec.msgpack.decode(data)), ensure_ascii=False, default=repr)
    text = f"{name} {fields}"
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}..."


def records(folder: Path) -> list[Path]:
    """Paths of the records in a folder, or in the `record` folder of a run directory. Raises RecordError."""
    for place in (folder, folder / "record"):
        found = sorted(place.glob("*.events"))
        if found:
            return found
    raise RecordError(f"{folder}: no *.events there: start the cluster with --set cluster.record=true")
