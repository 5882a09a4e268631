"""The messages of the live stream. Each is encoded once for all who have seen the one before."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

import tetri
from tetri.core.broker.history import ENDS, EVENTS, MOVES
from tetri.proc.gateway.history import IDLE, History, Rates
from tetri.proc.metrics import free_blocks

_encode = msgspec.json.encode
_NOTHING: dict[str, Any] = {"model": "", "notes": [], "monitor": None, "requests": {}, "instances": []}


class Recent:
    """Items with serials. `age`: where an item has its age in seconds."""

    def __init__(self, most: int, age: Any) -> None:
        self._kept: deque[tuple[int, float, Any]] = deque(maxlen=most)
        self._age = age

    def add(self, items: Iterable[Any], serial: int, now: float) -> int:
        """Add items, oldest first, with the serials after `serial`; return the last serial."""
        for item in items:
            serial += 1
            self._kept.append((serial, now - item[self._age], item))
        return serial

    def since(self, serial: int, now: float) -> list[Any]:
        """The items that are kept of those after `serial`, oldest first, with their ages now."""
        found = []
        for number, at, item in reversed(self._kept):
            if number <= serial:
                break
            aged = item.copy()
            aged[self._age] = round(max(now - at, 0.0), 3)
            found.append(aged)
        found.reverse()
        return found

    def clear(self) -> None:
        """Forget all items."""
        self._kept.clear()


@dataclass(frozen=True, slots=True)
class Seen:
    """What a watcher has seen: all up to a serial, and so many points."""

    serial: int
    points: int


class Frames:
    """The newest message, for each who watches, by what they have seen."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._moves, self._ended = Recent(MOVES, 3), Recent(ENDS, "age_s")
        self._events = Recent(EVENTS, 2)
        self._serial = self._epoch = 0
        self._status: Mapping[str, Any] = _NOTHING
        self._now = 0.0
        self._head = b""
        self._encoded: dict[Seen | None, bytes] = {}

    def observed(self, observation: Mapping[str, Any], now: float, at: float) -> None:
        """The broker has answered. `now`: seconds of any clock that does not jump; `at`: Unix time."""
        if observation["epoch"] != self._epoch:  # it has started again: nobody knows those requests any more
            self._moves.clear()
            self._ended.clear()
        self._epoch, self._status = observation["epoch"], observation["status"]
        serial = self._serial + observation["missed"]
        for recent, name in ((self._moves, "moves"), (self._ended, "ended"), (self._events, "events")):
            serial = recent.add(observation[name], serial, now)
        self._serial = serial
        self._begin(self._status["notes"], now, at)

    def missed(self, why: str, now: float, at: float) -> None:
        """The broker has not answered: show what is known, and say so."""
        self._begin([why, *self._status["notes"]], now, at)

    def of(self, seen: Seen | None) -> tuple[bytes, Seen]:
        """The newest message for one who has seen this (None: nothing), and what they have seen after it."""
        if (data := self._encoded.get(seen)) is None:
            data = self._encoded[seen] = self._encode(seen)
        return data, Seen(self._serial, self._history.added)

    def _begin(self, notes: list[str], now: float, at: float) -> None:
        status, rates = self._status, self._history.rates
        head = {
            "epoch": self._epoch,
            "now": round(at, 3),
            "version": tetri.__version__,
            **{name: status[name] for name in ("model", "monitor", "requests")},
            "notes": notes,
            "instances": [_instance(each, rates.get(each["iid"], IDLE)) for each in status["instances"]],
        }
        self._now, self._head = now, _encode(head)[:-1]
        self._encoded.clear()

    def _encode(self, seen: Seen | None) -> bytes:
        after, points = seen.serial if seen else 0, self._history.points
        found: dict[str, Any] = {
            "moves": self._moves.since(after, self._now),
            "ended": self._ended.since(after, self._now),
            "events": self._events.since(after, self._now),
        }
        found["missed"] = self._serial - after - sum(map(len, found.values())) if seen else 0
        new = points and (seen is None or seen.points < self._history.added)
        found["point"] = points[-1] if new else None
        if seen is None:
            found["history"] = [*points]
        return b"data: %b,%b\n\n" % (self._head, _encode(found)[1:])


def _instance(each: Mapping[str, Any], did: Rates) -> dict[str, Any]:
    load = each["load"]
    return {
        **{name: each[name] for name in ("iid", "role", "keeps", "state", "note", "blocks")},
        "free": free_blocks(load),
        **{name: load[name] for name in ("queued", "queued_tokens", "queued_s")},
        **{name: load[name] for name in ("waiting", "landed", "running", "heavy", "busy")},
        **{"fill": did.fill, "batch": did.batch, "received_bytes_s": round(did.received_bytes_s)},
        "ratio": each["step_ratio"],
    }
