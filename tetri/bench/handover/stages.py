"""Where the time of a hand-over goes, read from what the cores of a prefill and a decode worker heard and said
(`cluster.record = true`). Times are seconds of the monotonic clock, which all processes of a host share.

A record tells when an event was heard, not when it came. A forward pass begins when the core asked for it and ends when
its StepDone was heard. A copy begins when the core asked for it, or when the copy before it was done, and ends when its
Exported or Adopted was heard: the digest is within it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tetri.proc.recorder import RecordedCall, read, value


class Interval(NamedTuple):
    begun: float
    ended: float


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk: the forward pass that completed it, its copy into the sender's slab, and its copy out of it into the
    decode engine. `heard`: when the decode worker could begin that, since it knew of the chunk and had the blocks."""

    index: int
    computed: Interval
    exported: Interval
    reported: float
    copied: Interval


@dataclass(frozen=True, slots=True)
class Move:
    """One prompt of `tokens`, from the first forward pass of its prefill to its first decode step. `held_up`: how long
    a step of other requests was still under way on the decode side when the last chunk was announced."""

    rid: str
    tokens: int
    passes: tuple[Interval, ...]
    chunks: tuple[Chunk, ...]
    held_up: float
    first_step: Interval

    @property
    def prefilled(self) -> float:
        return self.passes[-1].ended

    @property
    def seconds(self) -> float:
        """From the end of prefill to the begin of the first decode step."""
        return self.first_step.begun - self.prefilled

    def stages(self) -> dict[str, float]:
        """What these seconds are made of, in order."""
        last = max(self.chunks, key=lambda chunk: chunk.copied.ended)
        end = self.chunks[-1].exported.ended
        return {
            "export": end - self.prefilled,
            "step_under_way": self.held_up,
            "message": last.copied.begun - end - self.held_up,
            "copy": last.copied.ended - last.copied.begun,
            "admission": self.first_step.begun - last.copied.ended,
        }


@dataclass(frozen=True, slots=True)
class Overlap:
    """Of the `chunks` that had a forward pass of the same prompt after theirs, so many whose copy on the decode side
    lay `inside`: it began after the prefill worker had put the chunk into its slab, and ended before the next pass did.
    `early_s`, of each: how long before the prefill engine was called for that pass its copy began. Between the two the
    prefill worker reads its messages and plans the pass, while the chunk is on its way already; 0 or less when the copy
    began later."""

    chunks: int
    inside: int
    early_s: tuple[float, ...]


def overlap(moves: Iterable[Move]) -> Overlap:
    inside = 0
    early: list[float] = []
    for move in moves:
        after = dict(zip(move.passes, move.passes[1:], strict=False))
        for chunk in move.chunks:
            follows = after.get(chunk.computed)
            if follows is None:
                continue
            inside += chunk.exported.ended <= chunk.copied.begun and chunk.copied.ended <= follows.ended
            early.append(follows.begun - chunk.copied.begun)
    return Overlap(len(early), inside, tuple(early))


@dataclass(slots=True)
class _Sent:
    """One prefill leg: `exports` by the chunk's index, with the pass before each."""

    tokens: int
    passes: list[Interval] = field(default_factory=list)
    exports: dict[int, tuple[Interval, Interval]] = field(default_factory=dict)


@dataclass(slots=True)
class _DecodeSide:
    """One decode leg: `copies` by the chunk's index, with the time at which each could begin."""

    rid: str
    copies: dict[int, tuple[float, Interval]] = field(default_factory=dict)
    first_step: Interval | None = None


class _Side:
    """One worker's record, call by call: what the prefill and the decode side have in common."""

    def __init__(self) -> None:
        self.asked_step = 0.0
        self.asked: dict[tuple[str, int], float] = {}  # a copy -> when the core asked for it
        self.copied = 0.0  # when the copy before was done
        self.steps: list[Interval] = []

    def follow(self, path: Path, copy: str, copied: str) -> Iterable[tuple[RecordedCall, str, Any]]:
        """Each call with its event, None where it is of no use. `copy` and `copied`: the action and its event."""
        for call in read(path)[1]:
            kind = call.event[0][0] if call.event else ""
            event = value(call.event[0]) if kind in ("StepDone", "Offer", copied) else None
            if kind == "StepDone":
                self.steps.append(Interval(self.asked_step, call.now))
            yield call, kind, event
            if kind == copied:
                self.copied = call.now
            for name, data in call.actions:
                if name == "Step":
                    self.asked_step = call.now
                elif name == copy:
                    action = value((name, data))
                    self.asked[action.key, action.index] = call.now

    def copy(self, event: Any, now: float) -> tuple[float, Interval]:
        asked = self.asked[event.key, event.index]
        return asked, Interval(max(asked, self.copied), now)


def _requests(call: RecordedCall) -> list[Any]:
    return [value(action).request for action in call.actions if action[0] == "AddRequest"]


def _sent(path: Path) -> dict[str, _Sent]:
    """By request id."""
    requests: dict[str, _Sent] = {}
    side = _Side()
    for call, kind, event in side.follow(path, "Export", "Exported"):
        for request in _requests(call):
            if request.phase == "prefill":
                requests[request.key] = _Sent(len(request.tokens))
        if kind == "StepDone":
            for span in event.spans:
                if span.key in requests:
                    requests[span.key].passes.append(side.steps[-1])
        elif kind == "Exported" and event.key in requests:
            request = requests[event.key]
            request.exports[event.index] = (request.passes[-1], side.copy(event, call.now)[1])
    return {key.split(":", 1)[1].rpartition(":")[0]: request for key, request in requests.items()}


def _decode_side(path: Path) -> tuple[dict[str, _DecodeSide], Sequence[Interval]]:
    """By request id; and all steps of this worker."""
    requests: dict[str, _DecodeSide] = {}
    side = _Side()
    for call, kind, event in side.follow(path, "Adopt", "Adopted"):
        if kind == "Offer":
            for request in _requests(call):
                requests[request.key] = _DecodeSide(event.rid)
        elif kind == "StepDone":
            for span in event.spans:
                if span.key in requests and requests[span.key].first_step is None:
                    requests[span.key].first_step = side.steps[-1]
        elif kind == "Adopted" and event.key in requests and event.problem is None:
            requests[event.key].copies[event.index] = side.copy(event, call.now)
    return {request.rid: request for request in requests.values()}, side.steps


def moves(prefill: Path, decode: Path) -> list[Move]:
    """What was handed from one worker to the other, in the order of the records. What did not get as far as its first
    decode step, or lacks a chunk in one of the records, is left out. Raises RecordError."""
    sent = _sent(prefill)
    samples, steps = _decode_side(decode)
    found = []
    for rid, request in samples.items():
        here = sent.get(rid)
        if (
            here is None
            or request.first_step is None
            or not here.exports
            or request.copies.keys() != here.exports.keys()
        ):
            continue
        chunks = tuple(Chunk(index, *here.exports[index], *request.copies[index]) for index in sorted(here.exports))
        announced = chunks[-1].exported.ended
        held_up = next((step.ended - announced for step in steps if step.begun <= announced < step.ended), 0.0)
        found.append(Move(rid, here.tokens, tuple(here.passes), chunks, held_up, request.first_step))
    return found
