"""What has happened lately, for those who look on: choices that entered a stage or ended, and events of instances."""

from __future__ import annotations

from collections import deque
from typing import Generic, NamedTuple, TypeVar

from tetri.request import Stage
from tetri.wire.clients import Done
from tetri.wire.observation import ClusterEvent, Ended, Move
from tetri.wire.packed_timelines import Moved

MOVES, ENDS, EVENTS = 512, 256, 256  # kept, and so in one Observation


class Finished(NamedTuple):
    """A choice ended. `prefill` and `decode`: the instances of its last attempt."""

    serial: int
    at: float
    rid: str
    done: Done
    tpot_s: float | None
    prefill: str
    decode: str


class Happened(NamedTuple):
    """Something happened to an instance."""

    serial: int
    at: float
    kind: str
    iid: str
    note: str


class Since(NamedTuple):
    """What has happened since a serial, oldest first. `missed`: how much of it is not kept any more."""

    moves: list[Move]
    ended: list[Ended]
    events: list[ClusterEvent]
    missed: int


Entry = TypeVar("Entry", Moved, Finished, Happened)


class Ring(deque[Entry], Generic[Entry]):
    """The newest entries, in order of their serials."""

    def since(self, serial: int) -> list[Entry]:
        """The entries after a serial, oldest first."""
        found: list[Entry] = []
        for entry in reversed(self):
            if entry.serial <= serial:
                break
            found.append(entry)
        return found[::-1]


class History:
    """The newest moves, ends and events. All have one `serial`, the number of those that ever were."""

    def __init__(self) -> None:
        self.serial = 0
        self._moves: Ring[Moved] = Ring(maxlen=MOVES)
        self._ended: Ring[Finished] = Ring(maxlen=ENDS)
        self._events: Ring[Happened] = Ring(maxlen=EVENTS)

    def moved(self, rid: str, stage: Stage, iid: str, attempt: int, outputs: int, now: float) -> Moved:
        """A choice entered a stage, or `iid` holds it now; "": no instance does."""
        self.serial += 1
        move = Moved(self.serial, now, rid, stage, iid, attempt, outputs)
        self._moves.append(move)
        return move

    def ended(self, rid: str, done: Done, tpot_s: float | None, prefill: str, decode: str, now: float) -> None:
        """A choice ended."""
        self.serial += 1
        self._ended.append(Finished(self.serial, now, rid, done, tpot_s, prefill, decode))

    def happened(self, kind: str, iid: str, note: str, now: float) -> None:
        """Something happened to an instance, or with "" to the deployment (ClusterEvent)."""
        self.serial += 1
        self._events.append(Happened(self.serial, now, kind, iid, note))

    def since(self, serial: int, now: float) -> Since:
        """What has happened since the serial of an earlier Observation; 0: all that is kept, and nothing is missed."""
        moves, ended, events = self._moves.since(serial), self._ended.since(serial), self._events.since(serial)
        missed = max(0, self.serial - serial - len(moves) - len(ended) - len(events)) if serial else 0
        return Since(
            [Move(each.rid, each.stage, each.iid, now - each.at, each.attempt, each.outputs) for each in moves],
            [_ended(each, now) for each in ended],
            [ClusterEvent(each.kind, each.iid, now - each.at, each.note) for each in events],
            missed,
        )


def _ended(end: Finished, now: float) -> Ended:
    done = end.done
    return Ended(
        rid=end.rid,
        reason=done.reason,
        age_s=now - end.at,
        ttft_s=done.ttft_s,
        tpot_s=end.tpot_s,
        jct_s=done.jct_s,
        prompt_tokens=done.usage.prompt_tokens,
        outputs=done.usage.completion_tokens,
        attempts=done.receipt.attempts,
        prefill=end.prefill,
        decode=end.decode,
        slo=done.slo,
        slo_result=done.slo_result,
    )
