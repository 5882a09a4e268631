"""Timelines in little memory, and how they are told. What is known of a choice is kept as it came in, and the Timeline
is made when somebody asks."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest

import msgspec
from msgspec import Struct

from tetri.request import Count, Name, Slo, Stage
from tetri.wire.clients import Done
from tetri.wire.observation import StageSpan, StepSpan, Timeline, TraceEvent

Steps = list[bytes]  # each of `pack_step`: choices of one batch share the bytes of a step
ReportedEvent = tuple[float, Name, TraceEvent]  # how far its clock is behind the broker's, the instance, the event
ARRAY32 = b"\xdd"  # a MessagePack array whose length follows in four bytes


class Moved(Struct, frozen=True, array_like=True, gc=False):
    """A choice entered a stage, or another instance holds it; "": none does. `at`: in seconds. `serial`: of what has
    happened at the broker."""

    serial: Count
    at: float
    rid: Name
    stage: Stage
    iid: Name
    attempt: Count
    outputs: Count


class Facts(Struct, frozen=True, array_like=True):
    """What is known of a choice. Times are in seconds on the broker's clock. `done`: None while it is open."""

    rid: Name
    choice: Count
    choices: Count
    arrival: float
    first_at: float | None
    tpot_s: float | None
    prompt_tokens: Count
    outputs: Count
    attempts: Count
    stage: Stage
    done: Done | None
    moves: list[Moved]
    events: list[ReportedEvent]
    left_out: Count
    slo: Slo


class Packed(Struct, frozen=True, gc=False):
    """What is known of an ended choice, in bytes. `count`: of its steps."""

    facts: bytes
    steps: bytes
    count: Count

    @property
    def size(self) -> int:
        """Bytes of both."""
        return len(self.facts) + len(self.steps)


_encoder = msgspec.msgpack.Encoder()
_facts = msgspec.msgpack.Decoder(Facts)
_steps = msgspec.msgpack.Decoder(list[StepSpan])


def pack_step(step: StepSpan) -> bytes:
    """A step in bytes. `start_s` is on the broker's clock."""
    return _encoder.encode(step)


def pack(facts: Facts, steps: Steps) -> Packed:
    """An ended choice in bytes."""
    exact = bytes(memoryview(_encoder.encode(facts)))  # the encoder's own bytes have space that is not used
    return Packed(exact, b"".join(steps), len(steps))


def unpacked(packed: Packed, now: float) -> Timeline:
    """The timeline of an ended choice at `now`."""
    return timeline(_facts.decode(packed.facts), [packed.steps], packed.count, now)


def timeline(facts: Facts, steps: Steps, count: int, now: float) -> Timeline:
    """The timeline at `now`. `steps`: together the bytes of `count` steps."""
    arrival, done, first_at = facts.arrival, facts.done, facts.first_at
    return Timeline(
        rid=facts.rid,
        choice=facts.choice,
        choices=facts.choices,
        age_s=now - arrival,
        prompt_tokens=facts.prompt_tokens,
        outputs=facts.outputs,
        attempts=facts.attempts,
        stage=facts.stage,
        reason=None if done is None else done.reason,
        error=None if done is None else done.error,
        ttft_s=None if first_at is None else first_at - arrival,
        tpot_s=facts.tpot_s,
        jct_s=None if done is None else done.jct_s,
        receipt=None if done is None else done.receipt,
        stages=_stage_spans(facts.moves, arrival, now),
        events=_events(facts.events, arrival),
        steps=_step_spans(steps, count, arrival),
        left_out=facts.left_out,
        slo=facts.slo,
        slo_result="" if done is None else done.slo_result,
    )


def _stage_spans(moves: list[Moved], arrival: float, now: float) -> list[StageSpan]:
    """The stages since the arrival, each up to the next one; the last up to `now`, unless it is an end."""
    spans: list[StageSpan] = []
    start = arrival
    for move, after in zip_longest(moves, moves[1:]):
        if after is None and move.stage.ended:
            break
        until = now if after is None else after.at
        passed = until == start and after is not None and (after.stage, after.attempt) == (move.stage, move.attempt)
        if not passed:  # a choice that is placed at once is in no queue before that
            spans.append(StageSpan(move.stage, move.attempt, move.iid, start - arrival, until - start))
        start = until
    return spans


def _events(reported: Iterable[ReportedEvent], arrival: float) -> list[TraceEvent]:
    """The events in the order in which they began, with their instances."""
    events = [
        msgspec.structs.replace(event, at=event.at + offset - arrival, iid=iid) for offset, iid, event in reported
    ]
    return sorted(events, key=lambda event: event.at)


def _step_spans(steps: Steps, count: int, arrival: float) -> list[StepSpan]:
    found = _steps.decode(b"".join([ARRAY32, count.to_bytes(4), *steps]))
    return [msgspec.structs.replace(step, start_s=step.start_s - arrival) for step in found]
