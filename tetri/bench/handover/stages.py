"""Compute the stages of a hand-over from the event records of a prefill and a decode worker (`cluster.record = true`).
Times are seconds of the monotonic clock, which all processes of a host share.

A record has the time at which a core handled an event, not its arrival. A forward pass lasts from the core's Step
action to its StepDone event. A copy lasts from the core's action, or the end of the copy before, to its Exported or
Adopted event; this includes the digest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tetri.proc.recorder import RecordedCall, read, value


class Interval(NamedTuple):
    """A time interval, in seconds."""

    begun: float
    ended: float


@dataclass(frozen=True, slots=True)
class Chunk:
    """One KV chunk: the forward pass that computed it, its copy into the sender's slab, and its copy from there into
    the decode engine. `reported`: when the decode worker asked for that copy: it had the announcement and the
    blocks."""

    index: int
    computed: Interval
    exported: Interval
    reported: float
    copied: Interval


@dataclass(frozen=True, slots=True)
class Move:
    """The hand-over of one prompt, from the first forward pass of its prefill to its first decode step. `held_up`: how
    long the decode worker was still busy with a step of other requests when the last chunk was announced."""

    rid: str
    tokens: int
    passes: tuple[Interval, ...]
    chunks: tuple[Chunk, ...]
    held_up: float
    first_step: Interval

    @property
    def prefilled(self) -> float:
        """The end of prefill."""
        return self.passes[-1].ended

    @property
    def seconds(self) -> float:
        """Seconds from the end of prefill to the start of the first decode step."""
        return self.first_step.begun - self.prefilled

    def stages(self) -> dict[str, float]:
        """Return the stages of `seconds`, in order."""
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
    """How much copies and prefill overlap. `chunks`: number of chunks that are followed by another forward pass of
    their prompt. `inside`: how many of them have a decode-side copy that began after the copy into the sender's slab
    and ended before that pass. `early_s`: for each chunk, how long before that pass its decode-side copy began; 0 or
    less if it began later. In this time the prefill worker reads messages and plans the pass."""

    chunks: int
    inside: int
    early_s: tuple[float, ...]


def overlap(moves: Iterable[Move]) -> Overlap:
    """Return the overlap of these hand-overs."""
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
    """The prefill side of a request. `exports`: chunk index -> (forward pass, copy into the slab)."""

    tokens: int
    passes: list[Interval] = field(default_factory=list)
    exports: dict[int, tuple[Interval, Interval]] = field(default_factory=dict)


@dataclass(slots=True)
class _DecodeSide:
    """The decode side of a request. `copies`: chunk index -> (time of the request for it, copy)."""

    rid: str
    copies: dict[int, tuple[float, Interval]] = field(default_factory=dict)
    first_step: Interval | None = None


class _Side:
    """Reads the record of one worker; shared by the prefill and the decode side."""

    def __init__(self) -> None:
        self.asked_step = 0.0
        self.asked: dict[tuple[str, int], float] = {}  # (key, chunk index) -> when the core asked for the copy
        self.copied = 0.0  # end of the copy before
        self.steps: list[Interval] = []

    def follow(self, path: Path, copy: str, copied: str) -> Iterable[tuple[RecordedCall, str, Any]]:
        """Yield each call with its event, None if the event is irrelevant. `copy`, `copied`: names of the copy's action
        and event."""
        for call in read(path)[1]:
            kind = call.event[0][0] if call.event else ""
            event = value(call.event[0]) if kind in ("StepDone", copied) else None
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
    """Return the prefill sides by request id."""
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
    """Return the decode sides by request id, and all steps of the worker."""
    requests: dict[str, _DecodeSide] = {}
    side = _Side()
    for call, kind, event in side.follow(path, "Adopt", "Adopted"):
        for request in _requests(call):  # with its Offer, or later if that was deferred
            if request.phase == "decode":
                requests[request.key] = _DecodeSide(request.key.split(":")[1])
        if kind == "StepDone":
            for sampled in event.tokens:
                if sampled.key in requests and requests[sampled.key].first_step is None:
                    requests[sampled.key].first_step = side.steps[-1]
        elif kind == "Adopted" and event.key in requests and event.problem is None:
            requests[event.key].copies[event.index] = side.copy(event, call.now)
    return {request.rid: request for request in requests.values()}, side.steps


def moves(prefill: Path, decode: Path) -> list[Move]:
    """Return the hand-overs between two workers, in the order of the decode record. Leaves out requests that did not
    reach their first decode step or lack a chunk in one of the records. Raises RecordError."""
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
