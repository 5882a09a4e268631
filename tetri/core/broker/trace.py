"""What is known of how one choice is served, while the broker remembers its request."""

from __future__ import annotations

from typing import NamedTuple

from tetri.request import Stage
from tetri.wire.observation import StageSpan, TraceEvent

MOST_STEPS, MOST_EVENTS = 4096, 512  # of one choice
# What a trace counts for: itself, each step that may follow (a reference, and the choice's share of the step), each of
# its moves and events.
TRACE_BYTES, STEP_BYTES, MOVE_BYTES, EVENT_BYTES = 512, 16, 128, 400


class Entered(NamedTuple):
    """The choice entered a stage, or another instance holds it. `at`: in seconds."""

    at: float
    stage: Stage
    attempt: int
    iid: str


class Trace:
    """What has happened to a choice. `moves` are in order; `steps` are in bytes (wire/kept.py). `leads`: ids and
    attempts of the choices whose prefill it has shared. `decoded_by`: the last instance that has decoded it."""

    __slots__ = ("decoded_by", "events", "leads", "left_out", "moves", "reserved", "steps")

    def __init__(self, reserved: int) -> None:
        """`reserved`: bytes that it counts for."""
        self.reserved = reserved
        self.moves: list[Entered] = []
        self.events: list[TraceEvent] = []
        self.steps: list[bytes] = []
        self.leads: tuple[tuple[str, int], ...] = ()
        self.decoded_by: str | None = None
        self.left_out = 0

    def add_step(self, step: bytes) -> None:
        """Add a step that wrote tokens of the choice, if there is space for it."""
        if len(self.steps) < MOST_STEPS:
            self.steps.append(step)
        else:
            self.left_out += 1


def stage_spans(moves: list[Entered], arrival: float, now: float) -> list[StageSpan]:
    """The stages since the arrival, each up to the next one; the last up to `now`, unless it is an end."""
    spans: list[StageSpan] = []
    start = arrival
    for number, move in enumerate(moves):
        after = moves[number + 1] if number + 1 < len(moves) else None
        if after is None and move.stage.ended:
            break
        until = now if after is None else after.at
        passed = until == start and after is not None and (after.stage, after.attempt) == (move.stage, move.attempt)
        if not passed:  # a choice that is placed at once is in no queue before that
            spans.append(StageSpan(move.stage, move.attempt, move.iid, start - arrival, until - start))
        start = until
    return spans
